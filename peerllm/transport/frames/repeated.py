"""Frames like the one before: step after step, nothing changes on a link but sequences, positions and payload."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.transport.frames.decoder import decode, segments_of
from peerllm.transport.frames.layout import HEADER, SEGMENT, padding
from peerllm.transport.frames.limits import FrameLimits
from peerllm.transport.frames.model import Frame, NamedTensor


@dataclass(frozen=True, slots=True)
class _Last:
    """What the rules were checked on: all of the bytes but segments and payload, and what the segments add up to."""

    nbytes: int
    fixed: bytes
    table_at: int
    table: bytes
    header_bytes: int
    frame: Frame
    tokens: int
    places: tuple[tuple[int, int], ...]  # of the payloads


class Decoder:
    """`decode` for one link, which looks again only at what differs from the frame before; the same frames come out."""

    def __init__(self, limits: FrameLimits) -> None:
        self._limits = limits
        self._last: _Last | None = None

    def decode(self, buffer: bytes | bytearray | memoryview) -> Frame:
        """FrameRefused (a FrameError) if the frame breaks a rule."""
        last = self._last
        if last is not None and len(buffer) == last.nbytes:
            view = memoryview(buffer)
            head = bytes(view[: last.header_bytes])
            if head.startswith(last.fixed) and head.endswith(last.table):
                old = last.frame
                middle = memoryview(head)
                segments = segments_of(middle, len(old.segments), old.kind, self._limits)
                if sum([segment.length for segment in segments]) == last.tokens:
                    tensors = tuple([
                        NamedTensor(one.name, one.dtype, one.shape, view[start:end])
                        for one, (start, end) in zip(old.tensors, last.places, strict=True)
                    ])  # fmt: skip
                    return Frame(old.kind, old.deployment, old.epoch, old.stage, segments, tensors)
        frame = decode(buffer, self._limits)
        self._remember(memoryview(buffer), frame)
        return frame

    def _remember(self, view: memoryview, frame: Frame) -> None:
        """Nothing where payloads have rules of their own: truth values, padding."""
        self._last = None
        if any(tensor.dtype == "BOOL" or padding(tensor.data.nbytes) for tensor in frame.tensors):
            return
        at = header_bytes = len(view) - sum(tensor.data.nbytes for tensor in frame.tensors)
        places = []
        for tensor in frame.tensors:
            places.append((at, at + tensor.data.nbytes))
            at += tensor.data.nbytes
        table_at = HEADER.size + len(frame.segments) * SEGMENT.size
        fixed, table = bytes(view[: HEADER.size]), bytes(view[table_at:header_bytes])
        self._last = _Last(
            len(view), fixed, table_at, table, header_bytes, frame, frame.tokens, tuple(places)
        )
