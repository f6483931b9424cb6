"""How long to wait until an engine that died is started again. Pure."""

from __future__ import annotations

from collections.abc import Callable

RESTART_FIRST_S, RESTART_MOST_S = 0.5, 30.0  # pauses of engines that die again and again: each is twice the one before
HEALTHY_S = 60.0  # after an engine that lived so long the pauses begin anew


class RestartBackoff:
    """An engine that was working starts again at once; those that die before that come ever more slowly."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._started_at, self._working = clock, clock(), False
        self._next_s = RESTART_FIRST_S

    def started(self) -> None:
        """An engine is being started."""
        self._started_at, self._working = self._clock(), False

    def working(self) -> None:
        """It has computed for a while (see messages.Working)."""
        self._working = True

    def pause_s(self) -> float:
        """It died: how long to wait."""
        if self._working or self._clock() - self._started_at >= HEALTHY_S:
            self._next_s = RESTART_FIRST_S
        if self._working:
            return 0.0
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, RESTART_MOST_S)
        return pause_s
