"""Log probabilities come with the tokens that asked for them: transformers' own, whatever the cut, also after moves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from peerllm.engine.messages import Tokens
from peerllm.logprobs import unpacked
from peerllm.types import Sampling
from tests.engine.engines import Cut, Deployed, deploy, devices, redeploy
from tests.engine.tiny import VOCABULARY, make_llama, prompt
from tests.sizes import FULL

pytestmark = pytest.mark.timeout(240)

TWO: Cut = ((0, 0, 2), (1, 3, 5))
THREE: Cut = ((0, 0, 1), (1, 2, 4), (0, 5, 5))
AT_HOME: Cut = ((0, 0, 5),)
CUTS = (TWO, THREE, AT_HOME, ((0, 0, 1), (1, 2, 2), (0, 3, 3), (1, 4, 5)))
PENALISED = Sampling(1.3, repetition_penalty=1.8, presence_penalty=0.5, frequency_penalty=0.4, seed=5)
WITHIN = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def told(deployed: Deployed, sequence: int) -> list[bytes]:
    """What came with the tokens of an answer, each once."""
    events = [one for one in deployed.source.events if isinstance(one, Tokens) and one.sequence == sequence]
    assert all(len(one.logprobs) in (0, len(one.ids)) for one in events)
    return [one for event in events for one in event.logprobs]


def check(whole: LlamaForCausalLM, given: Sequence[int], said: Sequence[int], logprobs: list[bytes], top: int) -> None:
    """Against the log-softmax of all logits of prompt and answer in one pass."""
    with torch.inference_mode():
        rows = whole(torch.tensor([[*given, *said]])).logits[0, len(given) - 1 : -1].log_softmax(-1).numpy()
    assert len(logprobs) == len(said) == len(rows)
    for token, packed, row in zip(said, logprobs, rows, strict=True):
        (own, *likeliest) = unpacked(packed)
        assert own[0] == token and len(likeliest) == min(top, VOCABULARY)
        np.testing.assert_allclose(own[1], row[token], atol=WITHIN)
        values = [value for _, value in likeliest]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, np.sort(row)[::-1][: len(values)], atol=WITHIN)
        np.testing.assert_allclose(values, [row[one] for one, _ in likeliest], atol=WITHIN)
        assert len({one for one, _ in likeliest}) == len(likeliest)


async def test_every_cut_tells_what_transformers_computes(model: Path, whole: LlamaForCausalLM, tmp_path: Path) -> None:
    asked = [(5, Sampling(), 20), (9, Sampling(1.5, seed=3), 1), (16, PENALISED, 5), (3, Sampling(0.8, top_k=2), 0)]
    async with devices(2, tmp_path, in_process=True) as made:
        for cut in CUTS if FULL else CUTS[:2]:
            deployed = await deploy(made, model, cut, slots=8, micro_batch=4)
            beside = deployed.submit(prompt(7, 7), 12)
            pooled = deployed.submit(prompt(8, 8), 1, pool="mean")
            running = [deployed.submit(prompt(n, n), 12, how, logprobs=top) for n, how, top in asked]
            for sequence, (length, _, top) in zip(running, asked, strict=True):
                said, end = await deployed.finished(sequence)
                assert end.finish == "length" and len(said) == 12, end
                check(whole, prompt(length, length), said, told(deployed, sequence), top)
            await deployed.finished(beside)
            await deployed.finished(pooled)
            assert not told(deployed, beside) and not told(deployed, pooled), "nobody asked"
            await deployed.until_free()
            await deployed.unload()


async def test_they_go_along_when_the_answer_moves(model: Path, whole: LlamaForCausalLM, tmp_path: Path) -> None:
    async with devices(2, tmp_path, in_process=True) as made:
        deployed = await deploy(made, model, TWO)
        asked = [(5, Sampling(), 3), (9, PENALISED, 20)]
        running = [deployed.submit(prompt(n, n), 60, how, logprobs=top) for n, how, top in asked]
        for cut in (THREE, AT_HOME, TWO):
            await asyncio.gather(*(deployed.some(one, 8 * deployed.epoch) for one in running))
            deployed.epoch += 1
            await redeploy(deployed, cut)
            await deployed.switch()
        for sequence, (length, _, top) in zip(running, asked, strict=True):
            said, _ = await deployed.finished(sequence)
            check(whole, prompt(length, length), said, told(deployed, sequence), top)


async def test_an_answer_that_is_known_in_part_has_those_of_the_rest(
    model: Path, whole: LlamaForCausalLM, tmp_path: Path
) -> None:
    """As after the source's engine was killed, or on another device."""
    async with devices(2, tmp_path, in_process=True) as made:
        deployed = await deploy(made, model, TWO)
        said, _ = await deployed.finished(deployed.submit(prompt(6, 6), 20, PENALISED, logprobs=4))
        again = deployed.submit(prompt(6, 6), 20, PENALISED, answer=said[:9], logprobs=4)
        await deployed.ended(again)
        assert deployed.said(again) == said[9:]
        check(whole, [*prompt(6, 6), *said[:9]], said[9:], told(deployed, again), 4)
