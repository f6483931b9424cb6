"""When a compute thread that waits in the middle of an answer goes through the coming step, and when it sleeps.

While a device waits for the others, its processor's caches fill with other things: after 25 ms of sleep (or of
polling) a pass over half of a model takes longer, after 25 ms of dry passes it does not (docs/benchmarks.md). So before
the next frame is due, and while it is late, the thread makes dry passes, each ended by whatever comes in.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

LEAD_S = 0.010  # before a frame is due, by the waits before
LATE_S = 0.05  # ... or that it is late: then the answer has ended, or waits for something else
KEPT = 1 / 8  # weight of a new wait in the mean
LONGEST_S = 10.0  # a wait that counts

Stop = Callable[[], bool]


class Warmed(Protocol):
    """A stage. `rehearse` goes through the step that comes next, until `stop`; False: it cannot."""

    def rehearse(self, stop: Stop) -> bool: ...


class Warmth:
    """Of one compute thread, which alone uses it. `wanted` is asked before every wait, and must be cheap."""

    def __init__(self, wanted: Callable[[], bool], clock: Callable[[], float] = perf_counter) -> None:
        self._wanted, self._clock = wanted, clock
        self._ended: tuple[Warmed, float] | None = None  # the last batch, if it was one of steps, and when
        self._next: dict[Warmed, Warmed] = {}  # what was computed after a stage last time
        self._waits: dict[Warmed, tuple[float, float]] = {}  # after a stage: mean seconds, mean deviation

    def begins(self, stage: Warmed) -> None:
        """A batch of `stage` is computed now."""
        if self._ended is None:
            return
        last, at = self._ended
        self._ended = None
        wait = self._clock() - at
        if wait <= LONGEST_S:
            mean, deviation = self._waits.get(last, (wait, 0.0))
            self._waits[last] = mean + KEPT * (wait - mean), deviation + KEPT * (abs(wait - mean) - deviation)
            self._next[last] = stage

    def ended(self, stage: Warmed, steps: bool) -> None:
        """It was; only after steps is the next one known."""
        self._ended = (stage, self._clock()) if steps and self._wanted() else None

    def forget(self, stage: Warmed) -> None:
        """It is unloaded."""
        self._ended = None
        self._waits.pop(stage, None)
        self._next = {last: after for last, after in self._next.items() if stage not in (last, after)}

    def pause_s(self) -> float:
        """How long nothing may come before `rehearse` is called: 0 now, infinite never."""
        if self._ended is None:
            return math.inf
        stage, at = self._ended
        mean, deviation = self._waits.get(stage, (0.0, 0.0))
        elapsed = self._clock() - at
        if elapsed > mean + LATE_S:
            return math.inf
        return max(0.0, mean - LEAD_S - 2 * deviation - elapsed)

    def rehearse(self, stop: Stop) -> None:
        """Once through what comes next."""
        if self._ended is None:
            return
        last, _ = self._ended
        try:
            if self._next.get(last, last).rehearse(stop):
                return
        except Exception:  # a rehearsal must not end an answer
            traceback.print_exc()
            self._next.clear()
        self._ended = None
