"""Both ends of a link remember the frame before: nothing else comes out than without, or is let through."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.transport.frames import (
    Decoder,
    Frame,
    FrameRefused,
    FrameSegment,
    NamedTensor,
    Rule,
    decode,
    encode,
    encode_buffers,
    template_of,
)
from peerllm.transport.frames.layout import HEADER, SEGMENT
from tests.transport.frames_support import LIMITS, changed_frames, frames


def outcome(data: bytes, decoder: Decoder | None = None) -> Frame | Rule:
    try:
        return decoder.decode(data) if decoder is not None else decode(data, LIMITS)
    except FrameRefused as refusal:
        return refusal.rule


@st.composite
def alike(draw: st.DrawFn, frame: Frame) -> bytes:
    """The frame with other sequences, places and payloads, of which some may not be allowed, or a byte changed."""
    if draw(st.booleans()):
        segments = tuple(
            FrameSegment(
                draw(st.integers(0, 2**64 - 1)),
                draw(st.integers(0, LIMITS.slots)),
                draw(st.integers(0, LIMITS.context)),
                draw(st.sampled_from([segment.length, segment.length, 0, 1, 4])),
                draw(st.integers(0, 4)),
            )
            for segment in frame.segments
        )
        return encode(replace(frame, segments=segments))
    data = bytearray(encode(frame))
    for _ in range(draw(st.integers(0, 2))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_same_comes_out_whatever_came_before(data: st.DataObject) -> None:
    frame = data.draw(frames())
    others = st.one_of(alike(frame), alike(frame), alike(frame), changed_frames(), frames().map(encode))
    decoder = Decoder(LIMITS)
    for came in [encode(frame), *data.draw(st.lists(others, min_size=1, max_size=6))]:
        assert outcome(came, decoder) == outcome(came)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_frame_sent_again_has_the_bytes_of_one_made_anew(data: st.DataObject) -> None:
    first = data.draw(frames())
    last = template_of(b"before", encode_buffers(first), first)
    if last is None:
        assert len(first.tensors) != 1 or first.tensors[0].data.nbytes % 8
        return
    numbers = st.integers(0, 2**32 - 1)
    segments = tuple(
        FrameSegment(data.draw(st.integers(0, 2**64 - 1)), *(data.draw(numbers) for _ in range(4)))
        for _ in first.segments
    )
    tensor = first.tensors[0]
    payload = data.draw(st.binary(min_size=tensor.data.nbytes, max_size=tensor.data.nbytes))
    second = replace(
        first, segments=segments, tensors=(NamedTensor.of(tensor.name, tensor.dtype, tensor.shape, payload),)
    )
    flat = [number for s in segments for number in (s.sequence, s.slot, s.position, s.length, s.flags)]
    assert last.filled(flat, payload) == b"before" + encode(second)
    assert (last.kind, last.nbytes) == (first.kind, len(encode(first)))
    for wrong in (flat[:-1], [*flat, 0], [*flat[:-1], 2**32], [-1, *flat[1:]], [2**64, *flat[1:]]):
        with pytest.raises(ValueError, match="segments"):
            last.filled(wrong, payload)
    for nbytes in {len(payload) - 1, len(payload) + 1} - {-1}:
        with pytest.raises(ValueError, match="bytes are not"):
            last.filled(flat, bytes(nbytes))


def test_each_byte_of_the_header_is_looked_at_again() -> None:
    for kinds in ({"BF16"}, {"U8"}, set()):
        frame = next_frame(kinds)
        data = encode(frame)
        for at in range(len(data)):
            for bits in (1, 0x80, 0xFF):
                came = bytearray(data)
                came[at] ^= bits
                decoder = Decoder(LIMITS)
                assert outcome(data, decoder) == frame
                assert outcome(bytes(came), decoder) == outcome(bytes(came)), (at, bits)
                assert outcome(data, decoder) == frame, "a refusal is no frame to go by"


def next_frame(dtypes: set[str]) -> Frame:
    """A frame of two segments with tensors of those types, the smallest that hypothesis finds."""
    from hypothesis import find

    return find(
        frames(),
        lambda one: len(one.segments) == 2 and {tensor.dtype for tensor in one.tensors} == dtypes,
        settings=settings(database=None, max_examples=20_000),
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_frame_like_the_one_before_is_not_checked_whole(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from peerllm.transport.frames import repeated

    frame = next_frame({"BF16"})
    decoder = Decoder(LIMITS)
    assert decoder.decode(encode(frame)) == frame
    monkeypatch.setattr(repeated, "decode", lambda *_: pytest.fail("looked at again"))
    later = replace(frame, segments=tuple(replace(one, position=one.position + count) for one in frame.segments))
    assert decoder.decode(encode(later)) == later
    assert HEADER.size + 2 * SEGMENT.size < len(encode(frame))
