"""Several engines as real processes: the same tokens for every cut, batch mix and way of sampling."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from peerllm.types import SCHEDULE_NAMES, Sampling
from tests.engine.engines import Cut, Deployed, deploy, devices
from tests.engine.tiny import make_llama, prompt, reference

pytestmark = pytest.mark.timeout(240)

CUTS: tuple[Cut, ...] = (
    ((0, 0, 5),),
    ((0, 0, 2), (1, 3, 5)),
    ((0, 0, 1), (1, 2, 4), (0, 5, 5)),  # the head back on the source
    ((0, 0, 1), (1, 2, 3), (2, 4, 5)),
    ((0, 0, 1), (1, 2, 2), (2, 3, 4), (0, 5, 5)),
    ((0, 0, 1), (1, 2, 2), (0, 3, 3), (1, 4, 5)),  # twice over the same two devices
    ((0, 0, 0), (0, 1, 3), (0, 4, 5)),  # handed over inside one process
)
SAMPLED = tuple(
    Sampling(temperature=1.5, top_p=0.95, top_k=40, repetition_penalty=1.3, frequency_penalty=0.5, seed=seed)
    for seed in range(4)
)
PROMPTS = tuple(prompt(length, length) for length in (1, 5, 8, 17, 30, 3, 9, 24))
COUNT = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


async def answers(deployed: Deployed) -> tuple[list[list[int]], list[list[int]]]:
    """(greedy, sampled) answers; as many sequences at once as there are slots."""
    greedy = [await deployed.generate(PROMPTS[0], COUNT)]
    greedy += await asyncio.gather(*(deployed.generate(ids, COUNT) for ids in PROMPTS[1:5]))
    greedy += await asyncio.gather(*(deployed.generate(ids, COUNT + 3 * n) for n, ids in enumerate(PROMPTS[5:])))
    sampled = await asyncio.gather(
        *(deployed.generate(PROMPTS[n], COUNT, sampling) for n, sampling in enumerate(SAMPLED))
    )
    await deployed.until_free()
    return greedy, list(sampled)


async def test_every_cut_gives_the_tokens_of_one_device(model: Path, tmp_path: Path) -> None:
    counts = [COUNT] * 5 + [COUNT + 3 * n for n in range(3)]
    expected = [reference(model, ids, count) for ids, count in zip(PROMPTS, counts, strict=True)]
    async with devices(3, tmp_path) as made:
        sampled: list[list[int]] = []
        for cut in CUTS:
            deployed = await deploy(made, model, cut)
            greedy, drawn = await answers(deployed)
            assert greedy == expected, cut
            sampled = sampled or drawn
            assert drawn == sampled, cut
            assert all(not device.links_lost() for device in made)
            await deployed.unload()
        assert len({tuple(ids) for ids in sampled}) == len(SAMPLED)
        assert sampled != expected[: len(sampled)]


async def test_every_schedule_gives_the_same_tokens(model: Path, tmp_path: Path) -> None:
    lengths = {8: 14, 3: 9, 17: 11, 5: 13}  # tokens of a prompt, of its answer
    expected = [reference(model, prompt(size, size), count) for size, count in lengths.items()]
    async with devices(2, tmp_path, in_process=True) as made:
        for schedule in SCHEDULE_NAMES:
            deployed = await deploy(made, model, CUTS[2], micro_batch=2, micro_batches=2, schedule=schedule)
            asked = (deployed.generate(prompt(size, size), count) for size, count in lengths.items())
            assert await asyncio.gather(*asked) == expected, schedule
            await deployed.until_free()
            await deployed.unload()
