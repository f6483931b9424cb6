"""Work that outlives the request that asked for it, and the long streams to be ended when the API closes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from peerllm.errors import OverloadedError

T = TypeVar("T")
MAX_CHANGES = 16  # changes of the household under way at once
CLOSE_S = 2.0  # seconds that cancelled work has to end
MAX_STREAMS = 512  # open streams, chats and status together; a deployment's queue is full before
MAX_BYTES = 64 << 20  # of the bodies of one asker's requests: parsed, each takes several times its size


class Tasks:
    """Owns the tasks; `close` cancels and awaits them."""

    def __init__(self) -> None:
        self._changes: set[asyncio.Task[Any]] = set()
        self._waking: dict[str, asyncio.Task[None]] = {}  # by model
        self._streams: dict[asyncio.Task[Any], tuple[str, int]] = {}  # who asks for each, and its body's bytes
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

    def waking(self, model: str, wake: Callable[[str], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """The one start of a model for all requests that wait for it."""
        if (task := self._waking.get(model)) is None or task.done():
            self._waking = {name: one for name, one in self._waking.items() if not one.done()}
            task = self._waking[model] = self.start(wake(model), f"start {model} for a request")
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()  # read, since the client that would have heard it may be gone

    @contextlib.contextmanager
    def stream(self, asker: str, nbytes: int = 0) -> Iterator[None]:
        """Around a long answer: bounded in number, ended at `close`; no asker has more than three quarters of all.

        `nbytes`: of what it was asked with, which is bounded for each asker too.
        """
        own = [size for one, size in self._streams.values() if one == asker]
        if len(own) >= 3 * (MAX_STREAMS - len(self._streams)) or self.closing:
            text = f"{len(self._streams)} answers are being streamed already, {len(own)} of them to you"
            raise OverloadedError(f"{text}; ask again in a moment")
        if sum(own) + nbytes > MAX_BYTES:
            raise OverloadedError("too many large requests of yours are under way; ask again in a moment")
        task = asyncio.current_task()
        assert task is not None
        self._streams[task] = asker, nbytes
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
