"""Conversations over three engines: a turn computes only what is new, and says what the whole model says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from peerllm.engine import base
from peerllm.engine.schedule import running_sequence
from peerllm.types import Sampling
from tests.engine.architectures import FAMILIES, VOCABULARY, save, tiny_model
from tests.engine.engines import GREEDY, Cut, Deployed, Device, deploy, devices

pytestmark = [pytest.mark.usefixtures("calm"), pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

CUT: Cut = ((0, 0, 1), (1, 2, 3), (2, 4, 5))
ANSWER = 6
SLACK = 4  # tokens that a window can go back by here, so that it slides within the test's lengths
DRAWN = Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.4, frequency_penalty=0.5, seed=11)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Device]]:
    async with devices(3, tmp_path_factory.mktemp("devices"), in_process=True) as made:
        yield made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By model type: its directory and the model as transformers runs it."""
    found: dict[str, tuple[Path, Any]] = {}

    def model(model_type: str) -> tuple[Path, Any]:
        if model_type not in found:
            directory = tmp_path_factory.mktemp(model_type)
            family = next(family for family in FAMILIES if family.model_type == model_type)
            found[model_type] = directory, save(tiny_model(family, 1.0, 0), directory)
        return found[model_type]

    return model


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole(model: Any, prompt: Sequence[int], count: int = ANSWER) -> list[int]:
    """Greedy tokens of the whole model, every time from the start."""
    said: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            said.append(int(model(torch.tensor([[*prompt, *said]]), use_cache=False).logits[0, -1].argmax()))
    return said


async def turn(
    deployed: Deployed, prompt: Sequence[int], client: str = "anna", sampling: Sampling = GREEDY
) -> tuple[list[int], int]:
    """The answer, and how many of the prompt's tokens were not computed for it."""
    sequence = deployed.submit(prompt, ANSWER, sampling, client=client)
    said, end = await deployed.finished(sequence)
    assert end.finish == "length", end
    return said, deployed.reused(sequence)


# Full attention; not packed; every layer windowed; windows beside full layers; recurrent layers beside full ones, which
# know the last position and that of a snapshot alone; convolutions; both in every layer; and recurrent layers that
# compute a run otherwise than single tokens.
GOES_BACK = {
    "llama": 99, "mpt": 99, "mistral": SLACK, "ministral": SLACK, "qwen3_next": 0, "lfm2": 0, "falcon_h1": 0,
    "granitemoehybrid": 0, "nemotron_h": -1,
}  # fmt: skip
TAIL = 3  # tokens between a snapshot and the prompt's end


@pytest.mark.parametrize("model_type", GOES_BACK)
async def test_a_conversation_says_what_the_whole_model_says(
    model_type: str, made: list[Device], models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", SLACK)
    monkeypatch.setattr(running_sequence, "TAIL", TAIL)
    monkeypatch.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 4)
    most = GOES_BACK[model_type]
    directory, model = models(model_type)
    deployed = await deploy(made, directory, CUT, chunk=7)
    try:
        first = ids(17, 1)
        said, reused = await turn(deployed, first)
        assert (said, reused) == (whole(model, first), 0)
        second = [*first, *said, *ids(10, 2)]
        drawn = await turn(deployed, second, "nobody", DRAWN)
        said, reused = await turn(deployed, second)
        assert (said, reused) == (whole(model, second), len(first) + ANSWER - 1 if most >= 0 else 0)
        held, snapshot = [*second, *said[:-1]], len(second) - TAIL
        for back, seed in ((3, 3), (15, 4)):  # the last words, and then whole turns, were taken back
            start = held[:-back]
            prompt = [*start, *ids(5, seed)]
            said, reused = await turn(deployed, prompt)
            known = snapshot if most == 0 and snapshot <= len(start) else 0
            assert (said, reused) == (whole(model, prompt), len(start) if back <= most else known)
            held, snapshot = [*prompt, *said[:-1]], len(prompt) - TAIL
        # What is drawn follows from seed and position, and penalties from the answer alone.
        assert drawn[1] == 0
        await turn(deployed, first, "ben")
        again = await turn(deployed, second, "ben", DRAWN)
        assert again == (drawn[0], len(first) + ANSWER - 1 if most >= 0 else 0)
        await deployed.until_free()
        assert not any(device.links_lost() for device in made)
    finally:
        await deployed.unload()


async def test_conversations_side_by_side_cancelled_and_evicted(made: list[Device], models: Any) -> None:
    directory, model = models("llama")
    deployed = await deploy(made, directory, CUT, slots=3, context=256)
    try:

        async def talk(client: str, seed: int) -> list[int]:
            prompt, found = ids(9 + seed, seed), []
            for number in range(3):
                said, reused = await turn(deployed, prompt, client)
                assert said == whole(model, prompt)
                found.append(reused)
                prompt = [*prompt, *said, *ids(12, 10 * seed + number)]
            return found

        found = await asyncio.gather(*(talk(client, seed) for seed, client in enumerate(("anna", "ben", "cleo"))))
        assert found == [[0, 9 + n + 5, 9 + n + 5 + 18] for n in range(3)]
        # Cancelled midway: what every stage has computed is there, whatever was still on its way.
        prompt = ids(100, 5)
        deployed.cancel(running := deployed.submit(prompt, ANSWER, client="dora"))
        assert (await deployed.finished(running))[1].finish == "cancelled"
        running = deployed.submit(prompt, 99, client="dora")
        await deployed.some(running, 3)
        deployed.cancel(running)
        said, end = await deployed.finished(running)
        assert end.finish == "cancelled"
        prompt = [*prompt, *said, *ids(3, 6)]
        said, reused = await turn(deployed, prompt, "dora")
        assert (said, reused >= 100) == (whole(model, prompt), True)
        # It took the place of whom nobody had talked to for longest, and nobody goes on with another's.
        assert (await turn(deployed, prompt, "cleo"))[1] == 0
        assert (await turn(deployed, prompt, "dora")) == (said, len(prompt) - 1)
    finally:
        await deployed.unload()
