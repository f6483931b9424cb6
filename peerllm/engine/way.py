"""The way from a stage to the next one's engine: its parcels as frames, a step like the one before in one go.

After a pass the processor's caches are full of weights, and each function that a step calls on its way out costs
microseconds; but for its numbers it is the step before.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ctypes import string_at
from typing import Protocol

import torch

from peerllm.engine.batching import Piece
from peerllm.engine.wire import NO_TOKEN, SAMPLE, Activation, Drawn, Parcel, to_frame
from peerllm.transport.frames import Frame
from peerllm.transport.links import DIRECT_BYTES
from peerllm.types import DeploymentId, DeviceId

_ID = struct.Struct("<q")
Form = tuple[int, torch.Size | None, torch.dtype | None]  # pieces; frames of one form differ in numbers alone


class Outlet(Protocol):
    """A link; `send` queues (LinkError if it is gone), `send_again` the last frame with other segments and payload."""

    @property
    def device(self) -> DeviceId: ...
    def send(self, frame: Frame) -> None: ...
    def send_again(self, segments: Sequence[int], payload: bytes) -> bool: ...


class Way:
    """Of one epoch, to `stage`."""

    def __init__(self, outlet: Outlet, deployment: DeploymentId, epoch: int, stage: int) -> None:
        self._outlet = outlet
        self._where = deployment, epoch, stage
        self._form: Form | None = None  # of what went last

    @property
    def device(self) -> DeviceId:
        return self._outlet.device

    def send(self, parcel: Parcel) -> None:
        """LinkError if the link is gone."""
        form = _form(parcel)
        if form is not None and form == self._form:
            assert isinstance(parcel, Activation | Drawn)
            if self._outlet.send_again(_numbers(parcel.pieces), _payload(parcel)):
                return
        self._form = None  # of no use if the next line fails
        self._outlet.send(to_frame(parcel, *self._where))
        self._form = form


def _form(parcel: Parcel) -> Form | None:
    """None: each is built anew."""
    if isinstance(parcel, Activation):
        hidden = parcel.hidden
        if hidden.nbytes > DIRECT_BYTES or not hidden.is_cpu or not hidden.is_contiguous():
            return None
        return len(parcel.pieces), hidden.shape, hidden.dtype
    return (len(parcel.pieces), None, None) if isinstance(parcel, Drawn) else None


def _numbers(pieces: Sequence[Piece]) -> list[int]:
    """As in FrameSegment, one after the other."""
    numbers: list[int] = []
    for piece in pieces:
        numbers += (piece.sequence, piece.slot, piece.position, piece.length, SAMPLE if piece.sample else 0)
    return numbers


def _payload(parcel: Activation | Drawn) -> bytes:
    if isinstance(parcel, Activation):
        return string_at(parcel.hidden.data_ptr(), parcel.hidden.nbytes)
    return b"".join([_ID.pack(NO_TOKEN if token is None else token) for token in parcel.tokens])
