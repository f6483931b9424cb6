"""The one way into the compute thread: a bounded queue that one thread fills and one empties.

Built on queue.SimpleQueue, which waits and wakes without running Python: every step of every sequence comes this way,
with the processor's caches full of weights, where each function that is called costs microseconds. A frame gets into
it on whichever thread reads the links: the loop, or with a SharedPoller the taker itself while it waits.
"""

from __future__ import annotations

from queue import SimpleQueue
from time import perf_counter
from typing import Generic, TypeVar

from peerllm.errors import OverloadedError
from peerllm.transport.links.poller import SharedPoller

KEPT = 1 / 16  # weight of a new hand-over in their mean
MAX_WAITING = 8192  # events; far above what the windows of the sequences in flight allow

T = TypeVar("T")


class Inbox(Generic[T]):
    """First in, first out; `put` never waits and raises OverloadedError when `limit` events are waiting.

    `put` and `close` are called by one thread (the loop's); with several, `limit` may be passed by one event for each.
    `poller` is to be set before the first event is taken.
    """

    poller: SharedPoller | None = None

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self._limit = limit
        self._events: SimpleQueue[T | None] = SimpleQueue()  # None: closed
        self._closed = self._ended = False
        self._idle = False  # the taker waits
        self._put_at = 0.0
        self.handover_s: float | None = None  # mean time from a put until a taker that waited has it

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._events.empty()

    def put(self, event: T, always: bool = False) -> None:
        """`always` is for the few events that are bounded otherwise and must not be lost."""
        if self._closed:
            raise OverloadedError("the engine is stopping")
        if not always and self._events.qsize() >= self._limit:
            raise OverloadedError(f"{self._limit} events wait for the compute thread already; ask again later")
        if self._idle:
            self._idle = False  # the first of several is who woke it
            self._put_at = perf_counter()
        self._put(event)

    def take(self, wait: bool) -> list[T] | None:
        """All that waits, in order; with `wait` at least one event. None once closed and empty."""
        taken: list[T] = []
        if self._ended:
            return None
        events = self._events
        if wait and events.empty():
            self._put_at, self._idle = 0.0, True
            if self.poller is not None:
                self.poller.wait(events.empty)
            event = events.get()
            self._idle = False
            if self._put_at:
                took = perf_counter() - self._put_at
                self.handover_s = took if self.handover_s is None else self.handover_s + KEPT * (took - self.handover_s)
            if not self._take(event, taken):
                return None
        while not events.empty() and self._take(events.get(), taken):
            pass
        return None if self._ended and not taken else taken

    def _put(self, event: T | None) -> None:
        self._events.put(event)
        poller = self.poller
        if poller is not None and poller.waits:
            poller.wake()

    def _take(self, event: T | None, taken: list[T]) -> bool:
        if event is None:
            self._ended = True
            return False
        taken.append(event)
        return True

    def close(self) -> None:
        """No more events are accepted; those waiting are still handed out."""
        if not self._closed:
            self._closed = True
            self._put(None)
