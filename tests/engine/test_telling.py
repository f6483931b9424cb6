"""What is told later is told: in order, behind the pass that it begins if that is short, before the thread waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerllm.engine import compute as compute_module
from peerllm.engine.base import Segment
from peerllm.engine.compute import Arrived, Compute, Linked, Loaded
from peerllm.engine.messages import Done, FromEngine, Submit, Tokens
from peerllm.engine.place import BROKEN
from peerllm.engine.telling import Telling
from peerllm.engine.trace import Recorder
from peerllm.engine.warmth import Warmth
from peerllm.engine.wire import Activation, Drawn, Opened, Parcel, from_frame
from peerllm.transport.frames import Frame
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, stage
from tests.engine.virtual import TOKEN, _draw, _Shard

TOKENS = 6


@given(st.lists(st.sampled_from(["now", "later", "some", "all"]), max_size=30))
def test_nothing_is_lost_or_overtaken(calls: list[str]) -> None:
    told: list[FromEngine] = []
    telling = Telling(told.append)
    given_out = 0
    for call in calls:
        match call:
            case "now" | "later":
                message = Done(given_out)
                given_out += 1
                (telling if call == "now" else telling.later)(message)
            case "some":
                telling.flush(1)
            case _:
                telling.flush()
        assert len(told) + len(telling) == given_out
        assert call in ("later", "some") or len(told) == given_out
        assert told == [Done(number) for number in range(len(told))]


class Shard(_Shard):
    """`fails`: (a position, what is raised when it is computed)."""

    fails: tuple[int, BaseException] | None = None

    def forward(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        if self.fails is not None and segments[0].position == self.fails[0]:
            raise self.fails[1]
        return super().forward(inputs, segments)


class Source:
    """A compute thread that holds the first stage, and the head as well or not; what lies between answers at once."""

    device = "away"

    def __init__(self, head: bool, fails: tuple[int, BaseException] | None = None) -> None:
        self.events: list[tuple[str, int]] = []  # ("sent", position) or ("told", start), in their order
        self.answer: list[int] = []
        self.ended = ""
        self._stages = 3 if head else 2
        self.compute = Compute(1, _draw, self._tell, Recorder(), Warmth(wanted=False))
        away: Any = "away"  # a Hop, which nobody here looks into
        for index in (0, 2) if head else (0,):
            shard: Any = Shard(index == 2)
            shard.fails = fails if index == 0 else None
            spec = stage(index, stage=index, stages=self._stages, downstream=away if index == 0 else None)
            self._put(Loaded(spec, shard))
        self._put(Linked(9, DEPLOYMENT, 1, {0: self}))
        self._put(Submit(DEPLOYMENT, 1, (3, 4), TOKENS, (), Sampling()))

    def _put(self, event: Any) -> None:
        self.compute.inbox.put(event)

    def _tell(self, message: FromEngine) -> None:
        if isinstance(message, Tokens):
            self.events.append(("told", message.start))
            self.answer += message.ids
            if message.finish is not None:
                self.ended = message.error or message.finish
                self.compute.inbox.close()

    def send_again(self, segments: Sequence[int], payload: bytes) -> bool:
        return False

    def send(self, frame: Frame) -> None:
        """The stage between passes on what it gets; as the head, it draws."""
        came: Parcel = from_frame(frame)[0]
        if isinstance(came, Activation):
            self.events.append(("sent", came.pieces[0].position))
            if self._stages == 2:
                came = Drawn(came.pieces, [TOKEN])
        if not self.ended and not (isinstance(came, Opened) and self._stages == 2):
            self._put(Arrived(DEPLOYMENT, 1, 2, [came], lambda: None))


# The prompt has two tokens: token n begins the step at position n + 2.
LONG = [("sent", 0)]
LONG += [event for token in range(TOKENS - 1) for event in (("told", token), ("sent", token + 2))]
LONG += [("told", TOKENS - 1)]


# How long a step takes is known after the first of them.
@pytest.mark.parametrize("head", [False, True])
def test_a_token_is_told_after_the_pass_it_begins(head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "SHORT_MS", 1e9)
    source = Source(head)
    source.compute.run()
    assert source.answer == [TOKEN] * TOKENS and source.ended == "length"
    order = [event for event in source.events if event[0] == "told"]
    assert order == [("told", token) for token in range(TOKENS)]
    for token in range(2, TOKENS - 1):
        assert source.events.index(("sent", token + 2)) < source.events.index(("told", token)), source.events
        assert source.events.index(("told", token)) < source.events.index(("told", token + 1))
    for token in range(2, TOKENS - 2):
        assert source.events.index(("told", token)) < source.events.index(("sent", token + 3)), "by one pass, not two"
    assert source.events.index(("told", 0)) < source.events.index(("sent", 2)), "the first is waited for"


@pytest.mark.parametrize("head", [False, True])
def test_it_is_told_before_where_passes_take_long(head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "SHORT_MS", 0.0)
    source = Source(head)
    source.compute.run()
    assert source.events == LONG


def test_what_had_come_is_told_when_the_next_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "SHORT_MS", 1e9)
    source = Source(False, fails=(4, ValueError("it is broken")))
    source.compute.run()
    assert source.answer == [TOKEN] * 3 and "it is broken" in source.ended, source.events


@pytest.mark.skipif(not BROKEN, reason="this torch knows no such error")
def test_and_when_the_accelerator_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_module, "SHORT_MS", 1e9)
    source = Source(False, fails=(4, BROKEN[0]("gone")))
    with pytest.raises(BROKEN):
        source.compute.run()
    assert source.answer == [TOKEN] * 3, source.events
