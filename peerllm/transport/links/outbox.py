"""The bounded queue between the compute thread, which fills it, and the loop, which empties it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from contextlib import suppress
from time import monotonic

from peerllm.errors import LinkError

SEND_QUEUE_FRAMES = 64
SEND_QUEUE_BYTES = 64 << 20  # a single larger frame still goes, alone
SEND_TIMEOUT_S = 60.0  # a slow stage may take its time; a dead one is noticed by its silence long before


class Outbox:
    """Frames on their way out. `put` from any thread; `get` on the loop only."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        max_frames: int = SEND_QUEUE_FRAMES,
        max_bytes: int = SEND_QUEUE_BYTES,
    ) -> None:
        self._loop = loop
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._ended = ""  # why nothing more is taken
        self._lock = threading.Lock()  # taken for each frame; the condition, which runs Python, only to wait for room
        self._room = threading.Condition(self._lock)
        self._waiting = 0  # for room
        self._filled = asyncio.Event()
        self._over = asyncio.Event()

    def put(self, frame: bytes, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Queue a frame; where the queue is full, wait for room. LinkError after `timeout_s`, or once the link ended.

        On the loop's own thread it never waits: that would stop what makes room.
        """
        with self._lock:
            if self._frames and not self._ended and not self._fits(len(frame)):
                self._wait_for_room(len(frame), timeout_s)
            if self._ended:
                raise LinkError(f"the link has ended: {self._ended}")
            self._frames.append(frame)
            self._bytes += len(frame)
            if len(self._frames) == 1:
                self._wake()

    def _wait_for_room(self, size: int, timeout_s: float) -> None:
        deadline = monotonic() + (0.0 if self._on_loop() else timeout_s)
        self._waiting += 1
        try:
            while not self._ended and not self._fits(size):
                left = deadline - monotonic()
                if left <= 0:
                    raise LinkError(f"{len(self._frames)} frames wait and none left within {timeout_s:g} s")
                self._room.wait(left)
        finally:
            self._waiting -= 1

    async def get(self) -> bytes | None:
        """The next frame, in order; None once the queue has ended and is empty."""
        while True:
            with self._lock:
                if self._frames:
                    frame = self._frames.popleft()
                    self._bytes -= len(frame)
                    if self._waiting:
                        self._room.notify()
                    return frame
                if self._ended:
                    return None
                self._filled.clear()
            await self._filled.wait()

    def end(self, reason: str, discard: bool = False) -> None:
        """Take nothing more; whoever waits for room gets LinkError. What is queued still goes, unless discarded."""
        with self._lock:
            if not self._ended:
                self._ended = reason
            if discard:
                self._frames.clear()
                self._bytes = 0
            self._room.notify_all()
            self._wake(over=True)

    async def wait_ended(self) -> None:
        """Until `end` was called."""
        await self._over.wait()

    @property
    def ended(self) -> str:
        """Why nothing more is taken; empty while it is."""
        return self._ended

    def __len__(self) -> int:
        return len(self._frames)

    def _fits(self, size: int) -> bool:
        if not self._frames:
            return True
        return len(self._frames) < self._max_frames and self._bytes + size <= self._max_bytes

    def _wake(self, over: bool = False) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody waits there any more
            self._loop.call_soon_threadsafe(self._filled.set)
            if over:
                self._loop.call_soon_threadsafe(self._over.set)

    def _on_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False
