"""How long frames take over one link: a PING right behind a frame comes back once the receiver has taken the frame.

From the moment the sender's thread had handed the frame over until its PONG, less what the PING waited there and half
of what a PING alone takes there and back (the PONG's way), is the frame's way: both event loops, TLS, the wire,
decoding. Encoding and handing over are the sender's own time: its pass is not over yet. At most one is under way, and
a few follow each beat, so that links are measured by what they carry anyway.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

KEPT = 1 / 8  # weight of a new round trip; the mean of the last few counts, not the least: a load is part of a hop
FRAMES = 8  # timed after each beat: single ones tell little where a processor is taken away now and then
LOST_S = 30.0  # an answer later than this is not waited for

OnTimed = Callable[[int, float], None]  # bytes of a frame and seconds of its way; 0 bytes: a PING there and back

_NUMBER = struct.Struct("<Q")
_HELD = struct.Struct("<I")  # microseconds
_MOST_HELD = 2**32 - 1


def answer(ping: bytes, held_s: float) -> bytes:
    """What to PONG: the PING's payload and how long ago the frame before it was taken."""
    return ping[: _NUMBER.size] + _HELD.pack(max(0, min(_MOST_HELD, int(held_s * 1e6))))


class Timing:
    """Sans-I/O. `wanted` and `mark` are for any thread, the rest for the loop; times are `perf_counter`'s."""

    def __init__(self, on_timed: OnTimed | None) -> None:
        self.wanted = False  # whether the next frame that finds the queue empty shall be timed
        self._on_timed = on_timed
        self._marked: tuple[bytes, float] | None = None
        self._number = 0
        self._asked: tuple[int, int, float] | None = None  # number, bytes of the frame (0: none), since when
        self._back_s = 0.0  # half a round trip of a PING alone
        self._pings = self._left = 0
        self._handed_over: float | None = None  # when the sender of the frame that is timed was free again

    def mark(self, frame: bytes, since: float) -> None:
        """This frame, which begins to be handed over at `since`, is to be timed."""
        self.wanted = False
        self._handed_over = None
        self._marked = (frame, since)

    def handed_over(self, now: float) -> None:
        """The sender goes on; the frame may be there already."""
        self._handed_over = now

    def beat(self, now: float) -> bytes | None:
        """What to PING with now; None while an answer is under way, or if nobody wants to know."""
        if self._on_timed is None or (self._asked is not None and now - self._asked[2] < LOST_S):
            return None
        self.wanted = False
        return self._ask(0, now)

    def sent(self, frame: bytes) -> bytes | None:
        """The frame has gone: what to PING with behind it, if it is to be timed."""
        marked = self._marked
        if marked is None or marked[0] is not frame:
            return None
        self._marked = None
        return None if self._asked is not None else self._ask(len(frame), marked[1])

    def ponged(self, payload: bytes, now: float) -> None:
        """A PONG came; the other side's own beats are empty."""
        asked = self._asked
        number, held = payload[: _NUMBER.size], payload[_NUMBER.size :]
        if asked is None or self._on_timed is None or number != _NUMBER.pack(asked[0]):
            return
        self._asked = None
        _, nbytes, since = asked
        took = now - since
        if nbytes:
            held_s = _HELD.unpack(held)[0] / 1e6 if len(held) == _HELD.size else 0.0
            self._left -= 1
            if self._handed_over is not None:
                took = now - max(since, self._handed_over)
            self.wanted = self._left > 0
            self._on_timed(nbytes, max(0.0, took - held_s - self._back_s))
            return
        self._pings += 1
        self._back_s += max(KEPT, 1 / self._pings) * (took / 2 - self._back_s)
        self.wanted, self._left = True, FRAMES
        self._on_timed(0, took)

    def _ask(self, nbytes: int, since: float) -> bytes:
        self._number += 1
        self._asked = (self._number, nbytes, since)
        return _NUMBER.pack(self._number)
