"""Log probabilities at the head, on the wire and at the source: beside answers without, with masks, and from liars."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peerllm.engine.messages import Submit
from peerllm.engine.sampler import SeededSampler, mask_bytes, token_logprobs
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.source_sequences import SourceSequences
from peerllm.engine.wire.parcels import (
    Drawn,
    Masked,
    Opened,
    TokenBatch,
    first_attempt,
    from_frame,
    source_limits,
    stage_limits,
    to_frame,
)
from peerllm.errors import FrameError
from peerllm.logprobs import ENTRY_BYTES, MAX_ENTRIES, MAX_LIKELIEST, packed, unpacked
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.frame import Frame, NamedTensor
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, VOCABULARY, FakeBackend, FakeShard, stage
from tests.transport.frames_support import encode

SPEC = stage(1, slots=4, context=64, micro_batch=4)
LIMITS = source_limits(SPEC, 8)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("size", [1, 7, 20, 5000])
def test_they_are_torchs(size: int, count: int) -> None:
    random_rows = np.random.default_rng(size).normal(0, 4, (4, size)).astype(np.float32)
    rows = [*random_rows, np.zeros(size, np.float32), np.round(random_rows[0]), random_rows[1] * 1e4]
    for row in rows:
        known = torch.tensor(row, dtype=torch.float64).log_softmax(-1).numpy()
        token = size // 2
        (own, *likeliest) = unpacked(token_logprobs(row, token, count))
        assert own[0] == token
        np.testing.assert_allclose(own[1], known[token], rtol=1e-5, atol=1e-5)
        ids = [one for one, _ in likeliest]
        assert ids == sorted(range(size), key=lambda one: (-row[one], one))[:count]
        np.testing.assert_allclose([value for _, value in likeliest], known[ids], rtol=1e-5, atol=1e-5)


def test_logits_of_any_size_have_some() -> None:
    row = np.array([3e38, -3e38, 0.0, 3e38], np.float32)
    entries = unpacked(token_logprobs(row, 1, 4))
    assert [one for one, _ in entries] == [1, 0, 3, 2, 1]
    assert entries[1][1] == pytest.approx(math.log(0.5)) and entries[0][1] < -1e38


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        packed([(1, -0.5)] * (MAX_ENTRIES + 1)),
        packed([(1, 0.5)]),
        packed([(1, -0.5), (-1, -0.5)]),
        packed([(1, math.nan)]),
        packed([(1, -math.inf)]),
    ],
)
def test_what_are_none_is_seen(data: bytes) -> None:
    with pytest.raises(ValueError, match="log prob"):
        unpacked(data)


def head() -> LoadedStage:
    return LoadedStage(SPEC, [HeldShard.of(SPEC, FakeShard(FakeBackend(), SPEC))], SeededSampler())  # type: ignore[arg-type]


def enter(stage: LoadedStage, sequence: int, asked: int | None, sampling: Sampling, attempt: int = 0) -> None:
    number = first_attempt(SPEC.epoch) + sequence + attempt
    assert stage.open(Opened(sequence, sequence, sampling, attempt=number, logprobs=asked)) is not None


def test_only_who_asked_has_them_in_a_pass() -> None:
    stage = head()
    asked = (None, 0, 3, 20)
    warm = Sampling(2.0, top_k=3, repetition_penalty=3.0, seed=5)
    for sequence, top in enumerate(asked):
        enter(stage, sequence, top, warm)
    chunk = [TokenRun(n, n, 0, 2, True) for n in range(4)]
    for each in chunk:
        assert stage.extend(each)
        stage.compute(TokenBatch([each], np.array([3, 4], np.int64)))
    runs = [TokenRun(n, n, 2, 1, True) for n in range(4)]
    assert all(map(stage.extend, runs))
    result, _ = stage.compute(TokenBatch(runs, np.array([5, 6, 7, 8], np.int64)))
    assert isinstance(result, Drawn)
    found = {run.sequence: (token, logprobs) for run, token, _, logprobs in result.each()}
    assert found[0][1] == b""
    own = [math.log(math.e / (math.e + VOCABULARY - 1)), math.log(1 / (math.e + VOCABULARY - 1))]  # one logit is 1
    for sequence, top in ((1, 0), (2, 3), (3, 20)):
        token, logprobs = found[sequence]
        best = (3 + 4 + 5 + sequence) % VOCABULARY
        (drawn, *likeliest) = unpacked(logprobs)
        assert drawn[0] == token and len(likeliest) == top
        assert drawn[1] == pytest.approx(own[token != best], abs=1e-5), "before temperature and penalties"
        assert [one for one, _ in likeliest[:1]] == [best][:top]
    enter(stage, 2, None, warm, attempt=9)
    run = TokenRun(2, 2, 0, 1, True)
    assert stage.extend(run)
    result, _ = stage.compute(TokenBatch([run], np.array([1], np.int64)))
    assert isinstance(result, Drawn) and not result.logprobs, "without any, nothing is told of them"


@pytest.mark.parametrize("late", [False, True])
def test_a_mask_changes_the_token_and_not_what_is_told_of_it(late: bool) -> None:
    stage = head()
    enter(stage, 1, 2, Sampling())
    bits = np.zeros(8 * mask_bytes(VOCABULARY), np.uint8)
    bits[77] = 1
    mask = Masked(1, 1, 2, np.packbits(bits, bitorder="little").tobytes())
    run = TokenRun(1, 1, 0, 2, True, masked=True)
    assert stage.extend(run)
    if not late:
        assert stage.masked(mask) == (None, [])
    result, _ = stage.compute(TokenBatch([run], np.array([20, 30], np.int64)))
    if late:
        assert result is None
        result, _ = stage.masked(mask)
    assert isinstance(result, Drawn)
    ((_, token, _, logprobs),) = result.each()
    assert token == 77
    assert [one for one, _ in unpacked(logprobs)] == [77, 50, 0]
    assert unpacked(logprobs)[0][1] < unpacked(logprobs)[1][1]


def runs(count: int = 4) -> list[TokenRun]:
    return [TokenRun(number, number, 0, 1, True) for number in range(count)]


def chances(*entries: tuple[int, float]) -> bytes:
    return packed(entries)


def test_they_cross_the_wire_as_they_are() -> None:
    most = chances(*((2**31 - 1 - at, -at / 3) for at in range(MAX_ENTRIES)))
    logprobs = [b"", chances((7, -0.5)), most, b""]
    frame = to_frame(Drawn(runs(), [5, 7, 8, None], logprobs=logprobs), DEPLOYMENT, SPEC.epoch, SPEC.stages)
    (found,) = from_frame(decode(encode(frame), LIMITS))
    assert isinstance(found, Drawn)
    assert [(token, own) for _, token, _, own in found.each()] == list(zip([5, 7, 8, None], logprobs, strict=True))
    bare = to_frame(Drawn(runs(), [5, 7, 8, None]), DEPLOYMENT, SPEC.epoch, SPEC.stages)
    assert [one.name for one in bare.tensors] == ["ids"]
    (found,) = from_frame(decode(encode(bare), LIMITS))
    assert isinstance(found, Drawn) and [own for *_, own in found.each()] == [b""] * 4


def test_the_largest_frame_fits_and_no_larger_one() -> None:
    full = [chances(*((at, -1.0) for at in range(MAX_ENTRIES)))] * SPEC.micro_batch
    frame = to_frame(Drawn(runs(), [0] * 4, logprobs=full), DEPLOYMENT, SPEC.epoch, SPEC.stages)
    assert len(encode(frame)) <= LIMITS.max_bytes
    from_frame(decode(encode(frame), LIMITS))
    larger = [*full[:3], full[0] + chances((1, -1.0))]
    frame = to_frame(Drawn(runs(), [0] * 4, logprobs=larger), DEPLOYMENT, SPEC.epoch, SPEC.stages)
    with pytest.raises(FrameError):
        decode(encode(frame), LIMITS)


def framed(counts: bytes | None, entries: int, tokens: tuple[int | None, ...] = (7, 8)) -> Frame:
    frame = to_frame(Drawn(runs(len(tokens)), tokens), DEPLOYMENT, SPEC.epoch, SPEC.stages)
    more = []
    if counts is not None:
        more.append(NamedTensor.of("counts", "U8", (len(counts),), counts))
    if entries:
        data = chances(*[(7, -1.0)] * entries)
        more.append(NamedTensor.of("logprobs", "U8", (entries, ENTRY_BYTES), data))
    return replace(frame, tensors=(*frame.tensors, *more))


@pytest.mark.parametrize(
    ("counts", "entries", "tokens"),
    [
        (None, 1, (7, 8)),
        (b"\1\0", 0, (7, 8)),
        (b"\0\0", 1, (7, 8)),
        (b"\1\1", 1, (7, 8)),
        (b"\2\2", 5, (7, 8)),
        (b"\1\1", 2, (7, None)),
        (b"\1", 1, (7, 8)),
        (b"\1\1\1", 3, (7, 8)),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: bytes | None, entries: int, tokens: tuple[int | None, ...]) -> None:
    with pytest.raises(FrameError):
        from_frame(decode(encode(framed(counts, entries, tokens)), LIMITS))
    from_frame(decode(encode(framed(b"\1\2", 3)), LIMITS))


def test_no_stage_takes_them_in() -> None:
    inner = stage(1, stage=1, stages=3, slots=4, micro_batch=4)
    frame = replace(framed(b"\1\1", 2), epoch=inner.epoch, stage=inner.stage)
    with pytest.raises(FrameError, match="does not have"):
        decode(encode(frame), stage_limits(inner, 8))


@pytest.mark.parametrize("asked", [None, 0, 5, MAX_LIKELIEST])
def test_what_is_asked_goes_round(asked: int | None) -> None:
    opened = Opened(1, 0, Sampling(), 3, logprobs=asked)
    frame = to_frame(opened, DEPLOYMENT, SPEC.epoch, SPEC.stages)
    assert from_frame(decode(encode(frame), LIMITS)) == [opened]
    pooled = Opened(1, 0, Sampling(), 3, pool="last")
    assert from_frame(decode(encode(to_frame(pooled, DEPLOYMENT, SPEC.epoch, SPEC.stages)), LIMITS)) == [pooled]


@pytest.mark.parametrize("made", [-1, 3 + MAX_LIKELIEST + 1, 2**40])
def test_what_no_head_makes_is_refused(made: int) -> None:
    frame = to_frame(Opened(1, 0, Sampling()), DEPLOYMENT, SPEC.epoch, SPEC.stages)
    entry = frame.tensor("entry")
    assert entry is not None
    data = bytes(entry.data[:-8]) + made.to_bytes(8, "little", signed=True)
    others = tuple(one for one in frame.tensors if one is not entry)
    with pytest.raises(FrameError, match="nothing that a head"):
        from_frame(replace(frame, tensors=(*others, NamedTensor.of("entry", "I64", (1, 6), data))))


def source(asked: int | None, vocabulary: int = 9, stop_ids: tuple[int, ...] = ()) -> tuple[SourceSequences, TokenRun]:
    made = SourceSequences(DEPLOYMENT, 2, 64, 8, 2, vocabulary, epoch=3)
    made.submit(Submit(DEPLOYMENT, 1, (1, 2), 5, stop_ids, Sampling(), logprobs=asked))
    made.leave(1)
    opened, _ = made.enter(1)
    assert opened.logprobs == asked
    made.came_round(opened)
    (run,) = made.feed()
    return made, run


@pytest.mark.parametrize(
    ("asked", "logprobs"),
    [
        (None, chances((3, -1.0))),
        (0, b""),
        (0, chances((4, -1.0))),
        (0, chances((3, 1.0))),
        (0, chances((3, -1.0), (3, -1.0))),
        (1, chances((3, -1.0))),
        (1, chances((3, -1.0), (9, -1.0))),
        (1, chances((3, -1.0), (3, math.nan))),
        (20, chances((3, -1.0), *((at, -1.0) for at in range(8)))),
        (1, b"1234567"),
    ],
)
def test_a_head_that_lies_ends_the_sequence(asked: int | None, logprobs: bytes) -> None:
    made, run = source(asked)
    with pytest.raises(FrameError):
        made.came_back(run, 3, None, logprobs)


def test_they_are_told_with_their_token() -> None:
    made, run = source(20)
    own = chances((3, -1.0), *((at, -1.0) for at in range(9)))
    step, told = made.came_back(run, 3, None, own)
    assert step is not None and told is not None and (told.ids, told.logprobs) == ((3,), (own,))
    assert made.came_back(run, 3, None, own) == (None, None), "once"
    made, run = source(1, stop_ids=(3,))
    told: Any = made.came_back(run, 3, None, chances((3, -1.0), (4, -1.0)))[1]
    assert (told.ids, told.finish, told.logprobs) == ((), "stop", ())


def test_a_chunk_has_none() -> None:
    made = SourceSequences(DEPLOYMENT, 2, 64, 2, 2, 9, epoch=3)
    made.submit(Submit(DEPLOYMENT, 1, (1, 2, 3, 4), 5, (), Sampling(), logprobs=0))
    made.leave(1)
    made.came_round(made.enter(1)[0])
    (run, *_) = made.feed()
    with pytest.raises(FrameError, match="nobody asked"):
        made.came_back(run, None, None, chances((3, -1.0)))
