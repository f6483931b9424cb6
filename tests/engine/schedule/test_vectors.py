"""Vectors at the head and at the source: beside answers in one pass, and from a head that lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from peerllm.engine.base import Reach
from peerllm.engine.messages import Submit
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.pooling import Pool
from peerllm.engine.schedule.source_sequences import SourceSequences
from peerllm.engine.wire.parcels import Drawn, Opened, TokenBatch, first_attempt, from_frame, source_limits, to_frame
from peerllm.errors import EngineError, FrameError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Pooling, Sampling
from tests.engine.fakes import DEPLOYMENT, FakeBackend, FakeShard, stage
from tests.transport.frames_support import encode

SPEC = stage(1, slots=4, context=64)
WIDTH = 4


class StatesShard(FakeShard):
    """A token's states are its id, four times."""

    def last_states(self, inputs: Any, run: TokenRun) -> Any:
        assert len(inputs) == run.length
        return np.repeat(np.asarray(inputs, np.float32)[:, None], WIDTH, 1)


def head(spec: Any = SPEC) -> LoadedStage:
    backend = FakeBackend()
    return LoadedStage(spec, [HeldShard.of(spec, StatesShard(backend, spec))], backend.sampler)  # type: ignore[arg-type]


def enter(stage: LoadedStage, sequence: int, pool: Pooling | None, attempt: int = 0) -> None:
    number = first_attempt(SPEC.epoch) + sequence + attempt
    assert stage.open(Opened(sequence, sequence, Sampling(), attempt=number, pool=pool)) is not None


def computed(stage: LoadedStage, *runs: tuple[TokenRun, Sequence[int]]) -> dict[int, tuple[int | None, Any]]:
    for run, _ in runs:
        assert stage.extend(run)
    ids = np.array([one for _, given in runs for one in given], np.int64)
    result, failed = stage.compute(TokenBatch([run for run, _ in runs], ids))
    assert not failed and isinstance(result, Drawn)
    return {
        run.sequence: (token, None if vector is None else vector.tolist()) for run, token, vector, _ in result.each()
    }


def test_vectors_and_answers_in_one_pass() -> None:
    stage = head()
    pools: tuple[Pooling | None, ...] = ("mean", None, "last", None)
    for sequence, pool in enumerate(pools):
        enter(stage, sequence, pool)
    for sequence in (0, 2):
        assert computed(stage, (TokenRun(sequence, sequence, 0, 2), [1, 2])) == {sequence: (None, None)}
    steps = [(TokenRun(n, n, 2 if pool else 0, 1, True), [n + 6]) for n, pool in enumerate(pools)]
    made = computed(stage, *steps)
    assert made[0] == (None, [3.0] * WIDTH) and made[2] == (None, [8.0] * WIDTH)
    assert made[1] == (7, None) and made[3] == (9, None)
    stage.release(1, keep=1)
    assert stage.chain[0].slots.kept(1)


def test_a_sequence_that_enters_again_begins_anew() -> None:
    stage = head()
    enter(stage, 1, "mean")
    computed(stage, (TokenRun(1, 1, 0, 2), [40, 40]))
    enter(stage, 1, "mean", attempt=9)
    assert computed(stage, (TokenRun(1, 1, 0, 2, True), [1, 3])) == {1: (None, [2.0] * WIDTH)}
    stage.release(1)
    assert not stage._pools


def test_what_is_no_number_ends_that_sequence_alone() -> None:
    pool = Pool("mean")
    with pytest.raises(EngineError, match="nothing"):
        pool.vector()
    pool.add(np.array([[np.inf]], np.float32))
    with pytest.raises(EngineError, match="finite"):
        pool.vector()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_chunks_make_no_difference(pooling: Pooling) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    whole, parts = Pool(pooling), Pool(pooling)
    whole.add(rows)
    for start in range(0, 40, 7):
        parts.add(rows[start : start + 7])
    assert whole.vector().tolist() == parts.vector().tolist()
    wanted = rows.astype(np.float64).mean(0) if pooling == "mean" else rows[-1]
    np.testing.assert_array_equal(whole.vector(), wanted.astype(np.float32))


def test_they_cross_the_wire_as_they_are() -> None:
    runs = [TokenRun(1, 0, 0, 3, True), TokenRun(2, 1, 3, 1, True), TokenRun(3, 2, 0, 2, True), TokenRun(4, 3, 0, 2)]
    vectors = [np.arange(WIDTH, dtype=np.float32) / 3, -np.arange(WIDTH, dtype=np.float32)]
    frame = to_frame(Drawn(runs, [None, 7, None, None], vectors), DEPLOYMENT, SPEC.epoch, SPEC.stages)
    (found,) = from_frame(decode(encode(frame), source_limits(SPEC, WIDTH)))
    assert isinstance(found, Drawn)
    assert [vector if vector is None else vector.tolist() for _, _, vector, _ in found.each()] == [
        vectors[0].tolist(), None, vectors[1].tolist(), None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "tokens", "shape"),
    [
        ([TokenRun(1, 0, 0, 5, True)], [7], (1, WIDTH)),
        ([TokenRun(1, 0, 0, 5)], [None], (1, WIDTH)),
        ([TokenRun(1, 0, 0, 5, True)], [None], (2, WIDTH)),
        ([TokenRun(1, 0, 0, 5, True)], [None], (1, WIDTH * SPEC.micro_batch + 1)),
    ],
)
def test_more_than_was_asked_for_is_refused(runs: Any, tokens: Any, shape: Any) -> None:
    frame = to_frame(Drawn(runs, tokens, list(np.ones(shape, np.float32))), DEPLOYMENT, SPEC.epoch, SPEC.stages)
    with pytest.raises(FrameError):
        from_frame(decode(encode(frame), source_limits(SPEC, WIDTH)))


@pytest.mark.parametrize(
    ("pool", "token", "vector"),
    [
        ("mean", None, None),
        ("mean", 3, None),
        ("mean", 3, [1.0]),
        ("last", None, [np.nan]),
        (None, None, [1.0]),
        (None, None, None),
    ],
)
def test_a_head_that_lies_ends_the_sequence(pool: Pooling | None, token: int | None, vector: Any) -> None:
    source = SourceSequences(DEPLOYMENT, 2, 64, 8, 2, 9, epoch=3)
    source.submit(Submit(DEPLOYMENT, 1, (1, 2), 5, (), Sampling(), pool=pool))
    source.leave(1)
    source.came_round(source.enter(1)[0])
    (run,) = source.feed()
    with pytest.raises(FrameError):
        source.came_back(run, token, None if vector is None else np.array(vector, np.float32))


def source_of(*orders: Submit, reach: Reach | None = None) -> SourceSequences:
    source = SourceSequences(DEPLOYMENT, 2, 64, 2, 1, 9, reach, epoch=3)
    for order in orders:
        source.submit(order)
    return source


def test_in_another_epoch_it_begins_at_its_first_token() -> None:
    source = source_of(Submit(DEPLOYMENT, 1, (1, 2, 3, 4, 5, 6), 1, (), Sampling(), pool="mean"))
    (run, *_) = source.feed()
    source.came_back(run, None)
    source.leave(1)
    opened, step = source.enter(1)
    assert (opened.position, opened.pool, step) == (0, "mean", None)
    source.came_round(opened)
    assert [one.position for one in source.feed()] == [0, 2]


@pytest.mark.parametrize(("first", "then"), [(None, "mean"), ("last", None), (None, None)])
def test_it_takes_up_no_slot_and_leaves_none(first: Pooling | None, then: Pooling | None) -> None:
    ids = (1, 2, 3, 4, 5, 6)
    order = Submit(DEPLOYMENT, 1, ids, 1, (), Sampling(), "me", pool=first)
    source = source_of(order, reach=Reach(True))
    source.leave(1)
    source.came_round(source.enter(1)[0])
    while source.running:
        for run in source.feed():
            ends = (7, None) if first is None else (None, np.ones(WIDTH, np.float32))
            source.came_back(run, *(ends if run.sample else (None, None)))
    source.drained(1)
    source.submit(Submit(DEPLOYMENT, 2, ids, 1, (), Sampling(), "me", pool=then))
    assert bool(source.reused(2)) is (first is None and then is None)
