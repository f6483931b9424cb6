"""One engine that holds the whole model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from peerllm.engine.messages import WORKING_STEPS, Done, QueryLoad, Working
from tests.engine.engines import deploy, devices
from tests.engine.fakes import FakeBackend, engine, stage
from tests.engine.tiny import make_llama, prompt, reference

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


async def test_greedy_equals_transformers(model: Path, tmp_path: Path) -> None:
    async with devices(1, tmp_path) as made:
        deployed = await deploy(made, model, ((0, 0, 5),))
        cases = [prompt(length, length) for length in (1, 7, 8, 9, 30)]
        answers = await asyncio.gather(*(deployed.generate(case, 12) for case in cases[:4]))
        answers.append(await deployed.generate(cases[4], 12))
        for case, answer in zip(cases, answers, strict=True):
            assert answer == reference(model, case, 12)
            assert len(set(answer)) > 2
        await deployed.until_free()


async def test_an_engine_tells_once_that_it_is_working(tmp_path: Path) -> None:
    async with engine(tmp_path, FakeBackend()) as line:

        async def working_after(sequence: int, count: int) -> int:
            line.submit(sequence, [1, 2, 3], count)
            await line.finished(sequence)
            await line.ask(QueryLoad(line.request()))
            return sum(isinstance(message, Working) for message in line.heard)

        assert isinstance(await line.ask(stage(line.request())), Done)
        assert await working_after(1, WORKING_STEPS) == 0, "the first token comes after the prompt"
        assert await working_after(2, 2) == 1
        assert await working_after(3, 2 * WORKING_STEPS) == 1
