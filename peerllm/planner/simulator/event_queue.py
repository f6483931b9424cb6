"""A heap of events and the resources that queue for them. Deterministic: ties are broken by order of entry."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

Action = Callable[[], None]
HAPPENS, DECIDES = 0, 1  # at one instant everything arrives and ends before any resource picks what to do next


class EventQueue:
    """What is still to happen; `now` is the simulated time in milliseconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Action]] = []
        self._entered = 0

    def after(self, delay_ms: float, action: Action, phase: int = HAPPENS) -> None:
        self._entered += 1
        heappush(self._heap, (self.now + delay_ms, phase, self._entered, action))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._heap:
            self.now, _, _, action = heappop(self._heap)
            action()


class Resource:
    """Serves one request at a time: the lowest rank first, and of equal ranks the one that came first."""

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self._waiting: list[tuple[tuple[int, ...], int, Action]] = []
        self._came = 0
        self._taken = False

    def ask(self, granted: Action, rank: tuple[int, ...] = ()) -> None:
        """`granted` is called, at this instant or a later one, when the resource is the caller's until `free`."""
        self._came += 1
        heappush(self._waiting, (rank, self._came, granted))
        self._queue.after(0.0, self._grant, DECIDES)

    def free(self) -> None:
        self._taken = False
        self._queue.after(0.0, self._grant, DECIDES)

    def _grant(self) -> None:
        if self._waiting and not self._taken:
            self._taken = True
            heappop(self._waiting)[2]()
