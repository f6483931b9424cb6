"""Work that outlives the request that asked for it, and the long streams to be ended when the API closes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from peerllm.errors import OverloadedError

T = TypeVar("T")
MAX_CHANGES = 16  # changes of the household under way at once
CLOSE_S = 2.0  # seconds that cancelled work has to end
MAX_STREAMS = 512  # open streams, chats and status together; a deployment's queue is full before


class Tasks:
    """Owns the tasks; `close` cancels and awaits them."""

    def __init__(self) -> None:
        self._changes: set[asyncio.Task[Any]] = set()
        self._streams: dict[asyncio.Task[Any], str] = {}  # and who asks for each
        self.closing = False

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A change of the household: it goes on when the client that asked for it hangs up."""
        if len(self._changes) >= MAX_CHANGES or self.closing:
            work.close()
            raise OverloadedError("too many changes are under way; ask again in a moment")
        task = asyncio.create_task(work, name=name)
        self._changes.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # read, since the client that would have heard it may be gone

    @contextlib.contextmanager
    def stream(self, asker: str) -> Iterator[None]:
        """Around a long answer: bounded in number, ended at `close`; no asker has more than three quarters of all."""
        own, room = sum(one == asker for one in self._streams.values()), MAX_STREAMS - len(self._streams)
        if own >= 3 * room or self.closing:
            text = f"{len(self._streams)} answers are being streamed already, {own} of them to you"
            raise OverloadedError(f"{text}; ask again in a moment")
        task = asyncio.current_task()
        assert task is not None
        self._streams[task] = asker
        try:
            yield
        finally:
            del self._streams[task]

    async def close(self) -> None:
        self.closing = True
        tasks = [*self._changes, *self._streams]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
