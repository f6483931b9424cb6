"""When a compute thread that waits in the middle of an answer goes through the coming step, and when it sleeps.

While a device waits for the others, its processor's caches fill with other things: after 25 ms of sleep (or of
polling) a pass over half of a model takes longer, after 25 ms of dry passes it does not (docs/benchmarks.md). So
shortly before the next frame is due, and while it is late, the thread makes dry passes; whatever comes in ends them.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

LEAD_S = 0.010  # before a frame is due, by the waits before; and twice their deviation ...
DEVIATION_S = 0.020  # ... of which no more counts
LATE_S = 0.050  # a frame may be so late; then the answer has ended, or waits for something else
LEAST_S = 0.001  # a shorter wait leaves the caches as they are
KEPT = 1 / 8  # weight of a new wait in the mean

Stop = Callable[[], bool]


class Warmed(Protocol):
    """A stage. `rehearse` goes through the step that comes next, until `stop`; False: it cannot."""

    def rehearse(self, stop: Stop) -> bool: ...


class Warmth:
    """Of one compute thread, which alone uses it, but for `want`."""

    def __init__(self, wanted: bool, clock: Callable[[], float] = perf_counter) -> None:
        self._wanted, self._clock = wanted, clock
        self._ended: tuple[Warmed, float] | None = None  # the last batch, if it was one of steps, and when
        self._left = False  # nothing can be rehearsed in this wait
        self._next: dict[Warmed, Warmed] = {}  # what was computed after a stage last time
        self._waits: dict[Warmed, tuple[float, float]] = {}  # after a stage: mean seconds, mean deviation
        self._failed: set[Warmed] = set()

    def want(self, wanted: bool) -> None:
        """From the next wait on. Any thread."""
        self._wanted = wanted

    def begins(self, stage: Warmed, steps: bool) -> None:
        """A batch of `stage` is computed now. A wait between steps counts as no longer than it would be rehearsed."""
        ended, self._ended = self._ended, None
        if ended is None or not steps:
            return
        last, at = ended
        wait = self._clock() - at
        mean, deviation = self._waits.get(last, (min(wait, LATE_S), 0.0))
        off = min(wait - mean, LATE_S)
        self._waits[last] = mean + KEPT * off, deviation + KEPT * (abs(off) - deviation)
        self._next[last] = stage

    def ended(self, stage: Warmed, steps: bool) -> None:
        """It was; only after steps is it known what comes next."""
        self._ended = (stage, self._clock()) if steps else None
        self._left = not self._wanted

    def forget(self, stage: Warmed) -> None:
        """It is unloaded."""
        self._ended = None
        self._waits.pop(stage, None)
        self._failed.discard(stage)
        self._next = {last: after for last, after in self._next.items() if stage not in (last, after)}

    def pause_s(self) -> float:
        """How long nothing may come before `rehearse` is called: 0 now, infinite never."""
        if self._ended is None or self._left:
            return math.inf
        stage, at = self._ended
        mean, deviation = self._waits.get(stage, (LEAST_S, 0.0))
        elapsed = self._clock() - at
        if mean < LEAST_S or elapsed > mean + LATE_S:
            return math.inf
        return max(0.0, mean - LEAD_S - 2 * min(deviation, DEVIATION_S) - elapsed)

    def rehearse(self, stop: Stop) -> None:
        """Once through what comes next."""
        if self._ended is None or self._left:
            return
        last, _ = self._ended
        stage = self._next.get(last, last)
        self._left = True
        if stage in self._failed:
            return
        try:
            self._left = not stage.rehearse(stop)
        except Exception:  # a rehearsal must not end an answer
            self._failed.add(stage)
            traceback.print_exc()
