"""Random conversations with tiny models, cut into one to three stages: each answer is what a fresh run gives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine import base
from peerllm.engine.base import Shard
from peerllm.engine.messages import Submit, Tokens
from peerllm.engine.sampler import SeededSampler
from peerllm.engine.schedule import running_sequence
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, stage
from tests.engine.runs import in_slot
from tests.engine.state.test_arriving_state import load
from tests.sizes import FULL

EXAMPLES = 300 if FULL else 12
SLOTS, CONTEXT, HEAD = 3, 60, 5
CUTS = ((0,), (0, 3), (0, 1, 4))  # the first layers of stages
# Windows beside full layers, convolutions, recurrent states; all of a layer in torch; latent vectors.
MODELS = [
    ("ministral", "graph"), ("lfm2", "graph"), ("qwen3_next", "graph"),
    *(pytest.param(*model, marks=pytest.mark.slow) for model in (
        ("falcon_h1", "torch"), ("qwen3_next", "torch"), ("granitemoehybrid", "graph"), ("deepseek_v3", "graph"),
    )),
]  # fmt: skip


@lru_cache
def shards(model_type: str, engine: str, cut: tuple[int, ...]) -> list[Shard]:
    ends = [*(first - 1 for first in cut[1:]), HEAD]
    return [load(model_type, engine, first, last) for first, last in zip(cut, ends, strict=True)]


class Household:
    """One device that holds all stages."""

    def __init__(self, stages: Sequence[Shard]) -> None:
        self.told: list[Tokens] = []
        self._schedule: Scheduler[Any] = Scheduler()
        specs = [
            stage(1, stage=place, stages=len(stages), slots=SLOTS, context=CONTEXT, chunk=7, downstream=None)
            for place in range(len(stages))
        ]
        self.deployment = LocalDeployment(DEPLOYMENT, self._schedule, self.told.append)  # type: ignore[arg-type]
        for spec, shard in zip(specs, stages, strict=True):
            self.deployment.loaded(LoadedStage(spec, [HeldShard.of(spec, shard)], SeededSampler()))
        self._sequence = 0

    def submit(self, client: str, prompt: Sequence[int], count: int) -> int:
        self._sequence += 1
        order = Submit(DEPLOYMENT, self._sequence, tuple(prompt), count, (), Sampling(), client)
        self.deployment.submit(order)
        return self._sequence

    def settle(self) -> None:
        while (batch := self._schedule.next()) is not None:
            (_, _, place), runs = batch
            self.deployment.rings[1].computed(place, *self.deployment.rings[1].stages[place].compute(runs))

    def answer(self, sequence: int) -> tuple[list[int], int]:
        """(its ids, how many of the prompt's tokens were reused)"""
        mine = [event for event in self.told if event.sequence == sequence]
        assert mine[-1].finish == "length", mine[-1]
        return [token for event in mine for token in event.ids], mine[0].reused


def fresh(shard: Shard, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens of the whole model in one shard, from the start."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        start = 0 if len(ids) == len(prompt) else len(ids) - 1
        rows = np.array(ids[start:], np.int64)
        ids.append(int(shard.forward(rows, [in_slot(0, start, len(rows), sample=True)])[0].argmax()))
    return ids[len(prompt) :]


TURN = st.tuples(
    st.sampled_from("ab"),  # who asks
    st.sampled_from((0, 0, 0, 1, 2, 4, 9, 99)),  # how many of the last tokens the template renders in another way
    st.lists(st.integers(3, 9), min_size=1, max_size=12),
    st.integers(1, 4),
)


@pytest.mark.parametrize(("model_type", "engine"), MODELS)
def test_answers_are_those_of_a_fresh_run(model_type: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", 4)
    monkeypatch.setattr(running_sequence, "TAIL", 2)
    monkeypatch.setattr(running_sequence, "LEAST_BEFORE_SNAPSHOT", 3)
    whole, reused_tokens = load(model_type, engine), 0

    @settings(max_examples=EXAMPLES, derandomize=True)
    @given(cut=st.sampled_from(CUTS), laps=st.lists(st.lists(TURN, min_size=1, max_size=SLOTS), max_size=6))
    def talk(cut: tuple[int, ...], laps: list[list[Any]]) -> None:
        nonlocal reused_tokens
        household = Household(shards(model_type, engine, cut))
        texts: dict[str, list[int]] = {"a": [], "b": []}
        for lap in laps:
            asked = []
            for client, back, new, count in lap:
                text = texts[client]
                prompt = [*text[: max(len(text) - back, 0)], *new][: CONTEXT - 5]
                asked.append((client, prompt, count, household.submit(client, prompt, count)))
            household.settle()
            for client, prompt, count, sequence in asked:
                said, reused = household.answer(sequence)
                assert said == fresh(whole, prompt, count)
                assert any(prompt[:reused] == text[:reused] for text in (texts[client], *(p for _, p, _, _ in asked)))
                reused_tokens += reused
                texts[client] = [*prompt, *said]

    talk()
    assert reused_tokens > 0
