"""A prompt's hidden states become one vector: for every cut what transformers computes, and nothing stays behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from peerllm.types import Pooling
from tests.engine.engines import Cut, Deployed, deploy, devices, redeploy
from tests.engine.tiny import make_llama, prompt, reference
from tests.sizes import FULL

pytestmark = pytest.mark.timeout(240)

CUTS: tuple[Cut, ...] = (
    ((0, 0, 5),),
    ((0, 0, 2), (1, 3, 5)),
    ((0, 0, 1), (1, 2, 4), (0, 5, 5)),
    ((0, 0, 1), (1, 2, 2), (0, 3, 3), (1, 4, 5)),
    ((0, 0, 0), (0, 1, 3), (0, 4, 5)),
)
LENGTHS = (1, 5, 9, 16, 30)  # chunks are of 8
EXACT = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wanted(model: Path) -> dict[tuple[int, Pooling], np.ndarray]:
    whole = AutoModel.from_pretrained(model, dtype=torch.float32)
    found: dict[tuple[int, Pooling], np.ndarray] = {}
    for length in LENGTHS:
        with torch.inference_mode():
            states = whole(torch.tensor([prompt(length, length)])).last_hidden_state[0].numpy()
        found[length, "mean"], found[length, "last"] = states.mean(0), states[-1]
    return found


async def vector(deployed: Deployed, length: int, pool: Pooling) -> np.ndarray:
    ids, end = await deployed.finished(deployed.submit(prompt(length, length), 1, pool=pool))
    assert (ids, end.finish, end.error) == ([], "stop", "")
    return np.array(end.vector, np.float32)


async def test_every_cut_gives_what_transformers_gives(
    model: Path, wanted: dict[tuple[int, Pooling], np.ndarray], tmp_path: Path
) -> None:
    async with devices(2, tmp_path, in_process=True) as made:
        for cut in CUTS if FULL else CUTS[:3]:
            deployed = await deploy(made, model, cut)
            asked = list(wanted)
            beside = asyncio.ensure_future(deployed.generate(prompt(7, 7), 12))
            found = []
            for start in range(0, len(asked), 3):
                found += await asyncio.gather(*(vector(deployed, *one) for one in asked[start : start + 3]))
            for one, made_of in zip(asked, found, strict=True):
                np.testing.assert_allclose(made_of, wanted[one], **EXACT, err_msg=f"{cut} {one}")
            assert await beside == reference(model, prompt(7, 7), 12), "an answer beside it is another"
            await deployed.until_free()
            await deployed.unload()


async def test_no_sequence_takes_up_what_it_left(model: Path, tmp_path: Path) -> None:
    async with devices(1, tmp_path, in_process=True) as made:
        deployed = await deploy(made, model, CUTS[0])
        ids = prompt(30, 30)
        await deployed.finished(deployed.submit(ids, 1, client="me", pool="mean"))
        answered = deployed.submit(ids, 3, client="me")
        assert (await deployed.finished(answered))[0] == reference(model, ids, 3)
        assert deployed.reused(answered) == 0
        first = (await deployed.finished(deployed.submit(ids, 1, client="me", pool="mean")))[1].vector
        again = (await deployed.finished(deployed.submit(ids, 1, client="me", pool="mean")))[1].vector
        assert first == again and len(first) == 32


async def test_a_change_of_epoch_in_the_middle_begins_it_anew(
    model: Path, wanted: dict[tuple[int, Pooling], np.ndarray], tmp_path: Path
) -> None:
    async with devices(2, tmp_path, in_process=True) as made:
        deployed = await deploy(made, model, CUTS[1], chunk=1)
        sequences = [deployed.submit(prompt(30, 30), 1, pool=pool) for pool in ("mean", "last")]
        deployed.epoch += 1
        await redeploy(deployed, CUTS[2], chunk=1)
        await deployed.switch()
        for sequence, pool in zip(sequences, ("mean", "last"), strict=True):
            ended = (await deployed.finished(sequence))[1]
            found = np.array(ended.vector, np.float32)
            np.testing.assert_allclose(found, wanted[30, pool], rtol=1e-4, atol=2e-5)  # tokens went one by one
        await deployed.until_free()
