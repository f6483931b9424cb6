"""Changes come in bursts: `poke` as often as you like, what follows happens at most once per interval."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable


class Debounce:
    """Calls `beat` and wakes every watcher after a poke: at once if the last beat is `interval_s` ago, else then."""

    def __init__(self, interval_s: float, beat: Callable[[], None]) -> None:
        self._interval_s, self._beat = interval_s, beat
        self._last = float("-inf")
        self._due: asyncio.TimerHandle | None = None
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    def poke(self) -> None:
        if self._due is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._due = loop.call_later(max(0.0, self._last + self._interval_s - loop.time()), self._run)

    def _run(self) -> None:
        self._due = None
        self._last = asyncio.get_running_loop().time()
        for watcher in self._watchers:
            watcher.set()
        self._beat()

    async def watch(self) -> AsyncIterator[None]:
        """Yields at once, then after every beat; a slow reader misses beats, never the last. Ends when closed."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            while not self._closed:
                event.clear()
                yield
                await event.wait()
        finally:
            self._watchers.discard(event)

    def close(self) -> None:
        self._closed = True
        if self._due is not None:
            self._due.cancel()
        for watcher in self._watchers:
            watcher.set()
