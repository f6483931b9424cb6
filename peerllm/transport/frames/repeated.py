"""Frames like the one before: step after step, nothing changes on a link but sequences, positions and payload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from struct import Struct
from struct import error as StructError

from peerllm.transport.frames.decoder import decode, segments_of
from peerllm.transport.frames.layout import HEADER, SEGMENT, padding
from peerllm.transport.frames.limits import FrameLimits
from peerllm.transport.frames.model import Frame, FrameKind, NamedTensor


@dataclass(frozen=True, slots=True)
class _Last:
    """What the rules were checked on: all of the bytes but segments and payload, and what the segments add up to."""

    nbytes: int
    fixed: bytes
    table: bytes
    header_bytes: int
    segments: int
    tokens: int
    kind: FrameKind
    epoch: int
    stage: int
    tensors: tuple[tuple[str, str, tuple[int, ...], int, int], ...]  # name, dtype, shape, where its payload lies


class Decoder:
    """`decode` for one link, which looks again only at what differs from the frame before; the same frames come out."""

    def __init__(self, limits: FrameLimits) -> None:
        self._limits = limits
        self._last: _Last | None = None

    def decode(self, buffer: bytes | bytearray | memoryview) -> Frame:
        """FrameRefused (a FrameError) if the frame breaks a rule."""
        last, view = self._last, memoryview(buffer).cast("B")
        if last is not None and len(view) == last.nbytes:
            head = bytes(view[: last.header_bytes])
            if head.startswith(last.fixed) and head.endswith(last.table):
                segments = segments_of(memoryview(head), last.segments, last.kind, self._limits)
                if sum([segment.length for segment in segments]) == last.tokens:
                    tensors = [NamedTensor(name, dtype, shape, view[a:b]) for name, dtype, shape, a, b in last.tensors]
                    return Frame(last.kind, self._limits.deployment, last.epoch, last.stage, segments, tuple(tensors))
        frame = decode(view, self._limits)
        self._last = _remembered(view, frame)
        return frame


class Template:
    """A frame that was sent, to be sent with other segments and another payload: the rest of its bytes is kept."""

    def __init__(self, before: bytes, header: bytes | memoryview, frame: Frame) -> None:
        """`header` are the frame's bytes up to its one payload, `before` what goes in front of them."""
        table = HEADER.size + len(frame.segments) * SEGMENT.size
        self._fixed, self._table = before + bytes(header[: HEADER.size]), bytes(header[table:])
        self._pack = _segments(len(frame.segments)).pack
        self.kind = frame.kind
        self.nbytes = len(header) + frame.tensors[0].data.nbytes  # of the frame
        self._payload_bytes = frame.tensors[0].data.nbytes

    def filled(self, segments: Sequence[int], payload: bytes) -> bytes:
        """The bytes, with as many segments (five numbers each, see FrameSegment) and as much payload as it had.

        ValueError if there are more or fewer, or a number does not fit its field.
        """
        if len(payload) != self._payload_bytes:
            raise ValueError(f"{len(payload)} bytes are not {self._payload_bytes}")
        try:
            return b"".join((self._fixed, self._pack(*segments), self._table, payload))
        except StructError as error:
            raise ValueError(f"segments {segments}: {error}") from error


def template_of(before: bytes, buffers: Sequence[bytes | memoryview], frame: Frame) -> Template | None:
    """Of what `encode_buffers` made of `frame`; None unless that is a header and one payload, without padding."""
    if len(frame.tensors) != 1 or len(buffers) != 2:
        return None
    return Template(before, buffers[0], frame)


@lru_cache
def _segments(count: int) -> Struct:
    return Struct("<" + SEGMENT.format.removeprefix("<") * count)


def _remembered(view: memoryview, frame: Frame) -> _Last | None:
    """None where payloads have rules of their own: truth values, padding."""
    sizes = [tensor.data.nbytes for tensor in frame.tensors]
    if any(tensor.dtype == "BOOL" for tensor in frame.tensors) or any(map(padding, sizes)):
        return None
    header_bytes = len(view) - sum(sizes)
    ends = [header_bytes]
    for size in sizes:
        ends.append(ends[-1] + size)
    return _Last(
        len(view),
        bytes(view[: HEADER.size]),
        bytes(view[HEADER.size + len(frame.segments) * SEGMENT.size : header_bytes]),
        header_bytes,
        len(frame.segments),
        frame.tokens,
        frame.kind,
        frame.epoch,
        frame.stage,
        tuple((t.name, t.dtype, t.shape, a, b) for t, (a, b) in zip(frame.tensors, pairwise(ends), strict=True)),
    )
