"""The channels of a link: what each one carries, who reads it, and how much of it may wait at either end.

To add a channel, declare it here, with its frame kinds in `frames/frame.py`; then hand an `Inlet` for it to the end of
a link that shall take it in.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from peerllm.errors import FrameError
from peerllm.transport.frames.frame import Frame, FrameKind
from peerllm.transport.frames.limits import FrameLimits

GRANT_MAGIC = b"PLGR"
_GRANT = struct.Struct("<4sB3sQ")  # magic, channel, zeros, bytes of it taken since the link began
FRAME_COST_BYTES = 4 << 10  # what a frame counts for beside its own bytes, which bounds the number of frames


@dataclass(frozen=True, slots=True, eq=False)
class LinkChannel:
    """One kind of traffic on a link, bounded by itself, so that a full channel does not stop another.

    The other end holds at most `credit_bytes` that its reader has not taken; what has no credit waits at the sender, at
    most `bound_bytes` of it, and one more frame ends the link. A frame larger than either still goes, alone.
    """

    number: int  # on the wire
    name: str
    kinds: tuple[FrameKind, ...]
    credit_bytes: int
    bound_bytes: int
    reader: Literal["compute", "loop"]  # which thread gets its frames: the one that waits for frames, or the loop


# In the order in which they are written where several wait.
STEP = LinkChannel(
    number=1,
    name="step",
    kinds=(FrameKind.ACTIVATION, FrameKind.TOKEN, FrameKind.RELEASE, FrameKind.OPEN, FrameKind.MASK),
    credit_bytes=64 << 20,
    bound_bytes=64 << 20,  # an engine sets it to what its plan lets be under way
    reader="compute",
)
COLLECTIVE = LinkChannel(2, "collective", (FrameKind.PARTIAL,), 16 << 20, 16 << 20, "compute")
ECHO = LinkChannel(5, "echo", (FrameKind.ECHO,), 1 << 20, 1 << 20, "compute")
GRADIENT = LinkChannel(4, "gradient", (FrameKind.GRADIENT,), 64 << 20, 64 << 20, "loop")
# Little on the way: steps of other links queue behind it in the same router.
KEY_VALUE = LinkChannel(3, "key-value", (FrameKind.KEY_VALUE,), 512 << 10, 8 << 20, "loop")

CHANNELS = (STEP, COLLECTIVE, ECHO, GRADIENT, KEY_VALUE)
_BY_NUMBER = {channel.number: channel for channel in CHANNELS}
CHANNEL_OF_KIND = {kind: channel for channel in CHANNELS for kind in channel.kinds}


def grant_payload(channel: LinkChannel, taken_bytes: int) -> bytes:
    """What tells the other end how much of a channel has been taken, and so gives credit back."""
    return _GRANT.pack(GRANT_MAGIC, channel.number, bytes(3), taken_bytes)


def read_grant(payload: bytes | bytearray) -> tuple[LinkChannel, int]:
    """FrameError if it is none."""
    if len(payload) == _GRANT.size:
        _, number, zeros, taken_bytes = _GRANT.unpack(payload)
        if number in _BY_NUMBER and zeros == bytes(3):
            return _BY_NUMBER[number], taken_bytes
    raise FrameError("a grant of credit for no channel")


class Delivery(NamedTuple):
    """A frame that came in on a channel, and what it counts for until whoever got it calls `taken`."""

    channel: LinkChannel
    frame: Frame
    cost_bytes: int
    give_back: Callable[[Delivery], None]  # Inbound.taken

    def taken(self) -> None:
        """Give its sender the credit back; by the channel's reader."""
        self.give_back(self)


Deliver = Callable[[Delivery], None]


@dataclass(frozen=True, slots=True)
class Inlet:
    """What one end of a link takes in on a channel.

    `deliver` runs on the channel's reader (for "compute": whichever thread reads) and must be cheap; a PeerLLMError
    that it raises ends the link.
    """

    channel: LinkChannel
    limits: FrameLimits
    deliver: Deliver

    def __post_init__(self) -> None:
        if not set(self.limits.kinds) <= set(self.channel.kinds):
            raise ValueError(f"{self.limits.kinds} do not all go on channel {self.channel.name}")


class Mailbox:
    """What came in on one channel and its reader has not taken: `add` is for the thread that reads the connection,
    `take` for the channel's reader."""

    def __init__(self, inlet: Inlet) -> None:
        self.inlet = inlet
        self._credit = credit = inlet.channel.credit_bytes
        largest = inlet.limits.max_bytes + FRAME_COST_BYTES
        self._quiet = min(credit // 2, max(0, credit - largest))  # kept untold: the largest frame must still have room
        self._came = self._taken = self._told = 0  # bytes since the link began

    def add(self, cost_bytes: int) -> None:
        """FrameError if its sender had no credit for so much."""
        waiting = self._came - self._taken
        if waiting and waiting + cost_bytes > self._credit:
            raise FrameError(f"more than its credit of {self._credit} bytes on channel {self.inlet.channel.name}")
        self._came += cost_bytes

    def take(self, cost_bytes: int) -> int | None:
        """How many bytes its sender shall hear to have been taken since the link began; None: not yet worth a word."""
        self._taken += cost_bytes
        if self._taken - self._told <= self._quiet:
            return None
        self._told = self._taken
        return self._taken
