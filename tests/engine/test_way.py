"""What a stage sends is what its parcels say, whether a frame is built anew or is the one before with other numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine.batching import Piece
from peerllm.engine.way import Way
from peerllm.engine.wire import Activation, Drawn, Opened, Parcel, Released, Rounded, shorten, to_frame
from peerllm.errors import LinkError
from peerllm.transport.frames import Frame, Template, encode, encode_buffers, template_of
from peerllm.transport.links import DIRECT_BYTES
from peerllm.types import Sampling

DEPLOYMENT, EPOCH, STAGE, HIDDEN = "ab" * 16, 3, 2, 8


class Kept:
    """An outlet that keeps the bytes."""

    device = "d" * 64

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.again = 0
        self.refuses = self.cut = False
        self._last: Template | None = None

    def send(self, frame: Frame) -> None:
        if self.cut:
            raise LinkError("cut")
        self.frames.append(encode(frame))
        self._last = template_of(b"", encode_buffers(frame), frame)

    def send_again(self, segments: Sequence[int], payload: bytes) -> bool:
        if self.refuses or self._last is None:
            return False
        self.frames.append(self._last.filled(segments, payload))
        self.again += 1
        return True


@st.composite
def parcels(draw: st.DrawFn) -> Parcel:
    kind = draw(st.sampled_from(["activation", "activation", "activation", "drawn", "drawn", "rounded", "open", "end"]))
    sequence = draw(st.integers(0, 5))
    if kind == "open":
        return Opened(sequence, draw(st.integers(0, 3)), Sampling(), draw(st.integers(0, 9)))
    if kind == "end":
        return Released(sequence, 1, draw(st.sampled_from(["", "why"])), draw(st.integers(0, 9)))
    lengths = draw(st.sampled_from([(1,), (1,), (1, 1), (1, 1, 1), (2, 1), (3,)]))
    pieces = [
        Piece(draw(st.integers(0, 2**64 - 1)), slot, draw(st.integers(0, 2**31)), length, draw(st.booleans()), None)
        for slot, length in enumerate(lengths)
    ]
    if kind == "drawn":
        tokens = st.none() | st.integers(0, 2**31 - 1)
        return Drawn(pieces, [draw(tokens) for _ in pieces])
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    numbers = torch.randn(sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(sequence)).to(dtype)
    if draw(st.booleans()):
        numbers = numbers.T.contiguous().T  # the same numbers, not in the order of the rows
    activation = Activation(pieces, numbers)
    if kind == "rounded":
        return shorten(activation)[0] or activation
    return activation


@given(st.lists(parcels(), min_size=1, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_bytes_are_the_frames(sent: list[Parcel], refusals: list[bool]) -> None:
    outlet = Kept()
    way = Way(outlet, DEPLOYMENT, EPOCH, STAGE)
    for parcel, refuses in zip(sent, refusals, strict=False):
        outlet.refuses = refuses
        way.send(parcel)
    assert outlet.frames == [encode(to_frame(parcel, DEPLOYMENT, EPOCH, STAGE)) for parcel in sent]


def step(position: int, sequences: int = 1) -> Activation:
    pieces = [Piece(7 + number, number, position, 1, True, None) for number in range(sequences)]
    return Activation(pieces, torch.full((sequences, HIDDEN), float(position)))


def test_steps_are_not_built_anew() -> None:
    outlet = Kept()
    way = Way(outlet, DEPLOYMENT, EPOCH, STAGE)
    for position in range(5):
        way.send(step(position))
    assert outlet.again == 4
    way.send(Released(9, 0))
    way.send(step(5))
    assert outlet.again == 4, "what it would have to look like is not what went last"
    way.send(step(6, 2))
    way.send(step(7, 2))
    assert outlet.again == 5
    for position in (8, 9):
        shortened = shorten(step(position, 2))[0]
        assert isinstance(shortened, Rounded)
        way.send(shortened)
    assert outlet.again == 5, "two payloads"
    large = Activation(step(10).pieces, torch.zeros(1, DIRECT_BYTES))
    way.send(large)
    way.send(large)
    assert outlet.again == 5 and len(outlet.frames) == 13, "nor is a large one copied in vain"


def test_a_frame_that_was_not_sent_is_none_to_go_by() -> None:
    outlet = Kept()
    way = Way(outlet, DEPLOYMENT, EPOCH, STAGE)
    way.send(step(0))
    outlet.cut, outlet.refuses = True, True
    with pytest.raises(LinkError):
        way.send(step(1))
    outlet.cut = outlet.refuses = False
    way.send(step(2))
    assert outlet.again == 0 and len(outlet.frames) == 2
