"""How long frames take over one link, by both ends' clocks.

A PING right behind a frame comes back with when the receiver handed the frame to its compute thread, and when it
answered. A PING alone tells how far the receiver's clock is ahead (RFC 5905's offset, from the quickest round trip of
late: its two ways differ least). So a frame's way is from the moment the sender's thread had handed it over until the
receiver's had it: what of its writing was left to the loop, the wire, TLS, decoding, and nothing of the answer's way,
which competes for the processor with the pass that the frame begins. Encoding and handing over, and with that writing a
small frame, are the sender's own time: its pass is not over yet. At most one is under way, and a few follow each beat,
so that links are measured by what they carry anyway.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

FRAMES = 4  # timed after each beat: a single one tells little where a processor is taken away now and then
LOST_S = 30.0  # an answer later than this is not waited for
KEPT_PINGS = 32  # PINGs alone that the clocks are compared by
DRIFT = 500e-6  # seconds a second that two clocks may run apart while one of them is being set (the kernel's bound)
LEAST_S = 1e-6  # of a frame's way: where the clocks' doubt is more than it took, it counts as next to nothing

OnTimed = Callable[[int, float], None]  # bytes of a frame and seconds of its way; 0 bytes: a PING there and back

_NUMBER = struct.Struct("<Q")
_CLOCK = struct.Struct("<qq")  # nanoseconds of the receiver's clock: the frame before was taken, the PING is answered


class OutstandingPing(NamedTuple):
    """A PING under way, and how many bytes the frame before it has (0: it is alone)."""

    number: int
    nbytes: int
    since: float


class ClockSample(NamedTuple):
    """What one PING alone says about the other clock."""

    at: float
    round_trip_s: float
    ahead_s: float

    def doubt_s(self, now: float) -> float:
        """How far off it may be by now."""
        return self.round_trip_s / 2 + DRIFT * (now - self.at)


def answer(ping: bytes, taken_s: float, now_s: float) -> bytes:
    """What to PONG: the PING's payload, when the frame before it was taken, and the time now."""
    return ping[: _NUMBER.size] + _CLOCK.pack(int(taken_s * 1e9), int(now_s * 1e9))


class FrameTimer:
    """Sans-I/O. `beat` is for the loop, `ponged` for who reads, the rest for any thread; times are `perf_counter`'s."""

    def __init__(self, on_timed: OnTimed | None) -> None:
        self.wanted = False  # whether the next frame that finds the queue empty shall be timed
        self._on_timed = on_timed
        self._number = self._left = 0
        self._asked: OutstandingPing | None = None
        self._lock = threading.Lock()  # one thing is asked at a time
        self._samples: deque[ClockSample] = deque(maxlen=KEPT_PINGS)
        self._handed_over: float | None = None  # when the sender of the frame that is timed was free again

    def ask(self, nbytes: int, since: float) -> bytes | None:
        """What to PING with right behind a frame of so many bytes, which begins to be handed over at `since`.

        None while an answer is under way.
        """
        self.wanted = False
        self._handed_over = None
        with self._lock:
            return None if self._asked is not None else self._ask(nbytes, since)

    def handed_over(self, now: float) -> None:
        """The sender goes on; the frame may be there already."""
        self._handed_over = now

    def beat(self, now: float) -> bytes | None:
        """What to PING with now; None while an answer is under way, or if nobody wants to know."""
        with self._lock:
            if self._on_timed is None or (self._asked is not None and now - self._asked.since < LOST_S):
                return None
            self.wanted = False
            return self._ask(0, now)

    def ponged(self, payload: bytes, now: float) -> None:
        """A PONG came; the other side's own beats are empty."""
        asked, number, clock = self._asked, payload[: _NUMBER.size], payload[_NUMBER.size :]
        if asked is None or self._on_timed is None or number != _NUMBER.pack(asked.number) or len(clock) != _CLOCK.size:
            return
        self._asked = None
        taken, answered = (nanoseconds / 1e9 for nanoseconds in _CLOCK.unpack(clock))
        if asked.nbytes:
            self._left -= 1
            self.wanted = self._left > 0
            since = asked.since if self._handed_over is None else max(asked.since, self._handed_over)
            way = taken - self._ahead(now) - since
            self._on_timed(asked.nbytes, min(max(LEAST_S, way), now - asked.since))  # whatever the other clock does
            return
        round_trip = now - asked.since
        self._samples.append(ClockSample(now, round_trip, answered - (asked.since + now) / 2))
        self.wanted, self._left = True, FRAMES
        self._on_timed(0, round_trip)

    def _ahead(self, now: float) -> float:
        """Seconds that the receiver's clock is ahead; frames are timed after a PING alone only."""
        return min(self._samples, key=lambda one: one.doubt_s(now)).ahead_s

    def _ask(self, nbytes: int, since: float) -> bytes:
        self._number += 1
        self._asked = OutstandingPing(self._number, nbytes, since)
        return _NUMBER.pack(self._number)
