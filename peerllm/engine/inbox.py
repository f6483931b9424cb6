"""The one way into the compute thread: a bounded queue that any thread may fill and only one empties."""

from __future__ import annotations

import threading
from collections import deque
from time import perf_counter
from typing import Generic, TypeVar

from peerllm.errors import OverloadedError

KEPT = 1 / 16  # weight of a new hand-over in their mean
MAX_WAITING = 8192  # events; far above what the windows of the sequences in flight allow

T = TypeVar("T")


class Inbox(Generic[T]):
    """First in, first out; `put` never waits and raises OverloadedError when `limit` events are waiting."""

    def __init__(self, limit: int = MAX_WAITING) -> None:
        self._limit = limit
        self._events: deque[T] = deque()
        self._filled = threading.Condition()
        self._closed = False
        self._idle = False  # the taker waits
        self._put_at = 0.0
        self.handover_s: float | None = None  # mean time from a put until a taker that waited has it

    def put(self, event: T, always: bool = False) -> None:
        """`always` is for the few events that are bounded otherwise and must not be lost."""
        with self._filled:
            if self._closed:
                raise OverloadedError("the engine is stopping")
            if len(self._events) >= self._limit and not always:
                raise OverloadedError(f"{self._limit} events wait for the compute thread already; ask again later")
            self._events.append(event)
            if self._idle and len(self._events) == 1:
                self._put_at = perf_counter()
            self._filled.notify()

    def take(self, wait: bool) -> list[T] | None:
        """All that waits, in order; with `wait` at least one event. None once closed and empty."""
        with self._filled:
            while wait and not self._events and not self._closed:
                self._idle = True
                self._filled.wait()
            if self._idle and self._events:
                took = perf_counter() - self._put_at
                self.handover_s = took if self.handover_s is None else self.handover_s + KEPT * (took - self.handover_s)
            self._idle = False
            if self._closed and not self._events:
                return None
            taken = list(self._events)
            self._events.clear()
            return taken

    def close(self) -> None:
        """No more events are accepted; those waiting are still handed out."""
        with self._filled:
            self._closed = True
            self._filled.notify_all()
