"""What a link costs, from single observations of it. Sans-I/O: the time is handed in, in seconds.

A hop takes latency + bytes · 8 / rate. Small frames tell the latency, large ones and downloads the rate; both are
exponentially weighted means of *times* (of a byte, for the rate), because it is times that a request adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

GAIN = 1 / 32  # weight of a new observation, once there are as many
FORGET_S = 300.0  # an estimate not renewed for so long counts no more than the next observation
SMALL_BYTES = 16 << 10  # frames up to this tell of latency, larger ones of the rate
MOST_BYTES = 1 << 40  # of one observation, so that sums stay finite
LEAST_S, MOST_S = 1e-6, 3600.0
SPAN_S = 0.25  # a download is looked at in pieces of at least this ...
SPAN_BYTES = 256 << 10  # ... and so much, past the first bytes of a connection
HUNGRY_SHARE = 0.8  # of its time a reader waited for the link: then the link was the bottleneck, not the reader
DOUBT = 2.0  # downloads so much slower than the last probe may have another cause: probe again when there is time
WIDER = 1.1  # a download so much quicker than the estimate shows that the link can do more, whoever waited

Source = Literal["measured", "traffic"]


@dataclass(slots=True)
class Mean:
    """An exponentially weighted mean; the first few observations count alike."""

    value: float | None = None
    at: float = 0.0
    _count: int = 0

    def add(self, value: float, now: float) -> None:
        if self.value is None or now - self.at >= FORGET_S:
            self.value, self._count = value, 1
        else:
            self._count += 1
            self.value += max(GAIN, 1 / self._count) * (value - self.value)
        self.at = now

    def replace(self, value: float, now: float) -> None:
        """A measurement on its own: what was thought before counts no more."""
        self.value, self.at, self._count = value, now, 1


@dataclass(slots=True)
class LinkEstimate:
    """One direction of one link."""

    source: Source = "measured"  # what the newest observation was
    _latency_s: Mean = field(default_factory=Mean)
    _byte_s: Mean = field(default_factory=Mean)
    _probed_byte_s: float | None = None

    @property
    def latency_ms(self) -> float | None:
        return None if self._latency_s.value is None else self._latency_s.value * 1e3

    @property
    def mbps(self) -> float | None:
        return None if self._byte_s.value is None else 8e-6 / self._byte_s.value

    @property
    def at(self) -> float | None:
        """When something was last observed."""
        times = [mean.at for mean in (self._latency_s, self._byte_s) if mean.value is not None]
        return max(times, default=None)

    @property
    def doubtful(self) -> bool:
        """Whether downloads ran so far below the probed rate that the link should be probed again."""
        if self._probed_byte_s is None or self._byte_s.value is None:
            return False
        return self._byte_s.value > DOUBT * self._probed_byte_s

    def probed(self, mbps: float, now: float) -> None:
        """Measured on purpose."""
        if isfinite(mbps) and mbps > 0:
            self._probed_byte_s = 8e-6 / mbps
            self._byte_s.replace(self._probed_byte_s, now)
            self.source = "measured"

    def echoed(self, timed: Sequence[tuple[int, float]], now: float) -> None:
        """Frames (bytes, seconds) timed on purpose, one at a time, while nothing else of ours went on.

        The lower quartile tells a hop's latency and the least times tell the rate: what else the machine did just then
        only ever adds to them. What our own load adds, frames of requests show.
        """
        small = [(n, s) for n, s in timed if _sane(n, s) and n <= SMALL_BYTES]
        large = [(n, s) for n, s in timed if _sane(n, s) and n > SMALL_BYTES]
        if not small:
            return
        nbytes, seconds = sorted(small, key=lambda one: one[1])[len(small) // 4]
        if large:
            (more, most_s), (less, least_s) = (min(some, key=lambda one: one[1]) for some in (large, small))
            if most_s - least_s > LEAST_S:
                self._byte_s.replace((most_s - least_s) / (more - less), now)
        self._latency_s.replace(max(LEAST_S, seconds - nbytes * (self._byte_s.value or 0.0)), now)
        self.source = "measured"

    def framed(self, nbytes: int, seconds: float, now: float) -> None:
        """A frame of a request took so long to the next stage."""
        if not _sane(nbytes, seconds):
            return
        if nbytes <= SMALL_BYTES:
            self._latency_s.add(max(LEAST_S, seconds - nbytes * (self._byte_s.value or 0.0)), now)
        elif self._latency_s.value is not None and seconds > 2 * self._latency_s.value:  # else it tells too little
            self._byte_s.add((seconds - self._latency_s.value) / nbytes, now)
        else:
            return
        self.source = "traffic"

    def carried(self, nbytes: int, seconds: float, waited_s: float, now: float) -> None:
        """A download had `nbytes` in `seconds`, of which its reader waited for the link `waited_s`."""
        if not _sane(nbytes, seconds):
            return
        byte_s, known = seconds / nbytes, self._byte_s.value
        if waited_s >= HUNGRY_SHARE * seconds or (known is not None and byte_s * WIDER < known):
            self._byte_s.add(byte_s, now)
            self.source = "traffic"


def _sane(nbytes: int, seconds: float) -> bool:
    return 0 < nbytes <= MOST_BYTES and LEAST_S <= seconds <= MOST_S


@dataclass(slots=True)
class Meter:
    """Downloads over one link, several at once, cut into pieces for `LinkEstimate.carried`."""

    readers: int = 0
    _waiting: int = 0
    _since: float = 0.0
    _bytes: int = 0
    _waited_s: float = 0.0
    _mark: float = 0.0  # up to when waiting has been counted

    def opened(self, now: float) -> None:
        """A download has its first bytes; they are not counted, the request's latency is in them."""
        self.readers += 1
        if self.readers == 1:
            self._start(now)

    def closed(self, now: float) -> None:
        self._count(now)
        self.readers -= 1

    def waits(self, now: float) -> None:
        """A reader waits for the link."""
        self._count(now)
        self._waiting += 1

    def came(self, nbytes: int, now: float) -> tuple[int, float, float] | None:
        """A reader's wait has ended; (bytes, seconds, seconds waited) once there is enough to tell something."""
        self._count(now)
        self._waiting -= 1
        self._bytes += nbytes
        if self._bytes < SPAN_BYTES or now - self._since < SPAN_S:
            return None
        piece = self._bytes, now - self._since, self._waited_s
        self._start(now)
        return piece

    def _start(self, now: float) -> None:
        self._since = self._mark = now
        self._bytes, self._waited_s = 0, 0.0

    def _count(self, now: float) -> None:
        if self._waiting:
            self._waited_s += now - self._mark
        self._mark = now
