"""Epochs side by side on real engines: sequences change from one to another, and lost stages are computed again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from peerllm.engine.messages import Unload
from peerllm.types import Sampling
from tests.engine.architectures import FAMILIES, save, tiny_model
from tests.engine.engines import WAIT_S, Cut, Deployed, Device, deploy, devices, redeploy
from tests.engine.tiny import make_llama, prompt

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

THREE: Cut = ((0, 0, 1), (1, 2, 3), (2, 4, 5))
ELSEWHERE: Cut = ((0, 0, 1), (3, 2, 3), (2, 4, 5))
GREEDY = Sampling()
DRAWN = Sampling(temperature=1.3, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4, seed=7)
ANSWER, LONG = 24, 80


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Device]]:
    async with devices(4, tmp_path_factory.mktemp("devices"), in_process=True) as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


async def lose(device: Device, deployed: Deployed) -> None:
    """All that the device had of the deployment is gone, as when its engine had died."""
    await device.host.ask(Unload(device.host.next_request(), deployed.id), WAIT_S)


async def counts(made: list[Device]) -> list[int]:
    return [(await device.load()).replayed_tokens for device in made]


async def change(deployed: Deployed, cut: Cut, **options: Any) -> None:
    deployed.epoch += 1
    await redeploy(deployed, cut, **options)
    await deployed.switch()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
async def test_a_stage_is_lost_at_every_token(made: list[Device], model: Path, sampling: Sampling) -> None:
    deployed = await deploy(made, model, THREE, context=256)
    undisturbed = await deployed.generate(prompt(9), LONG, sampling)
    for number in range(1, 7):
        running = deployed.submit(prompt(9), LONG, sampling)
        await deployed.some(running, number)
        before = await counts(made)
        lost, spare = (1, 3) if number % 2 else (3, 1)
        await lose(made[lost], deployed)
        await change(deployed, ((0, 0, 1), (spare, 2, 3), (2, 4, 5)), context=256)
        assert (await deployed.finished(running))[0] == undisturbed
        first, *_, head, _ = (now - then for now, then in zip(await counts(made), before, strict=True))
        assert first >= 9 and head == 0, "the layers after those that were lost compute nothing again"
        await deployed.unload(deployed.epoch - 1)
    await deployed.until_free()
    await deployed.unload()


async def test_a_stage_that_grows_loads_what_is_new(made: list[Device], model: Path) -> None:
    deployed = await deploy(made, model, THREE, context=256)
    loaded = [(await device.load()).held_bytes.get(deployed.id, 0) for device in made]
    undisturbed = await deployed.generate(prompt(9), LONG)
    running = deployed.submit(prompt(9), LONG)
    await deployed.some(running, 3)
    before = await counts(made)
    await change(deployed, ((0, 0, 1), (1, 2, 4), (2, 5, 5)), context=256)
    assert (await deployed.finished(running))[0] == undisturbed
    now = [(await device.load()).held_bytes.get(deployed.id, 0) for device in made]
    a_block = loaded[1] // 2
    assert now == [loaded[0], loaded[1] + a_block, loaded[2] + loaded[2] - a_block, 0], "each loaded what was missing"
    await deployed.unload(deployed.epoch - 1)
    after = (await made[2].load()).held_bytes[deployed.id]
    assert after == loaded[2] - a_block, "what no epoch uses is freed"
    assert (await counts(made))[0] > before[0]
    await deployed.unload()


async def test_shards_with_room_for_another_context_are_loaded_anew(made: list[Device], model: Path) -> None:
    deployed = await deploy(made, model, THREE, context=256)
    undisturbed = await deployed.generate(prompt(9), LONG)
    room = [(await device.load()).kv_bytes for device in made[:3]]
    running = deployed.submit(prompt(9), LONG)
    await deployed.some(running, 3)
    await change(deployed, THREE, context=128)
    assert (await deployed.finished(running))[0] == undisturbed
    await deployed.unload(deployed.epoch - 1)
    now = [(await device.load()).kv_bytes for device in made[:3]]
    assert all(after < before for before, after in zip(room, now, strict=True))
    await deployed.unload()


async def test_four_answers_while_the_plan_goes_to_and_fro(made: list[Device], model: Path) -> None:
    deployed = await deploy(made, model, THREE, context=256)
    samplings = [GREEDY, DRAWN, GREEDY, DRAWN]
    undisturbed = [await deployed.generate(prompt(30, n), 60, one) for n, one in enumerate(samplings)]
    running = [deployed.submit(prompt(30, n), 60, one) for n, one in enumerate(samplings)]
    before = await counts(made)
    for step, cut in enumerate((ELSEWHERE, THREE, ((0, 0, 3), (2, 4, 5)), THREE)):
        await deployed.some(running[step % 4], 4 * step)
        await change(deployed, cut, context=256)
    for sequence, expected in zip(running, undisturbed, strict=True):
        assert (await deployed.finished(sequence))[0] == expected
    assert await counts(made) != before
    held = await made[1].load()
    assert held.held_bytes[deployed.id] == held.weight_bytes + held.kv_bytes, "one shard for all epochs"
    await deployed.unload(deployed.epoch - 1)
    await deployed.until_free()
    await deployed.unload()


async def test_an_answer_whose_beginning_is_known_goes_on(made: list[Device], model: Path) -> None:
    deployed = await deploy(made, model, THREE)
    for sampling in (GREEDY, DRAWN):
        whole = await deployed.generate(prompt(9), ANSWER, sampling)
        for known in (1, 7, ANSWER - 1, ANSWER):
            sequence = deployed.submit(prompt(9), ANSWER, sampling, answer=whole[:known])
            await made[0].until(lambda sequence=sequence: ended(made[0], sequence))
            told = [event for event in made[0].events if getattr(event, "sequence", None) == sequence]
            assert [i for event in told for i in event.ids] == whole[known:]
            assert told[0].start == known and told[-1].finish == "length"
    await deployed.until_free()
    await deployed.unload()


def ended(device: Device, sequence: int) -> bool:
    return any(getattr(event, "sequence", None) == sequence and event.finish for event in device.events)


@pytest.mark.parametrize("model_type", ["mistral", "qwen3_next", "nemotron_h"])
async def test_other_kinds_of_layers(made: list[Device], tmp_path: Path, model_type: str) -> None:
    """Windows, recurrent states, and states that single tokens change otherwise than runs."""
    save(tiny_model(next(family for family in FAMILIES if family.model_type == model_type), 1.0, 0), tmp_path)
    deployed = await deploy(made, tmp_path, THREE, dtype="float32")
    undisturbed = await deployed.generate(prompt(20), ANSWER, DRAWN)
    for number in (1, 5):
        running = deployed.submit(prompt(20), ANSWER, DRAWN)
        await deployed.some(running, number)
        lost, spare = (1, 3) if number == 1 else (3, 1)
        await lose(made[lost], deployed)
        await change(deployed, ((0, 0, 1), (spare, 2, 3), (2, 4, 5)))
        assert (await deployed.finished(running))[0] == undisturbed
    await asyncio.gather(deployed.unload())
