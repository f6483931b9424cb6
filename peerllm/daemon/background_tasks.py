"""Work that nobody waits for: it has an owner that ends it, and what it raises is logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class BackgroundTasks:
    """`start` some, `close` ends all."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do it from now on; a failure is logged under this name."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Cancel what goes on and wait for it; may be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed", task.get_name(), exc_info=task.exception())


class LatestTasks:
    """At most one task of each kind: a new one takes the place of what goes on. `failed` hears what one raises."""

    def __init__(self, of: str, failed: Callable[[BaseException], None]) -> None:
        self._of, self._failed = of, failed
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, kind: str, work: Coroutine[Any, Any, None]) -> None:
        """Do it, and not what is still being done of the same kind."""
        self.cancel(kind)
        task = self._tasks[kind] = asyncio.create_task(work, name=f"{kind}: {self._of}")
        task.add_done_callback(lambda done: self._ended(kind, done))

    def cancel(self, kind: str) -> None:
        """Do it no longer; nothing happens if it is not being done."""
        if (task := self._tasks.pop(kind, None)) is not None:
            task.cancel()

    def going_on(self, kind: str) -> bool:
        """Whether there is a task of that kind."""
        return kind in self._tasks

    def current(self, kind: str) -> bool:
        """Whether the caller is the task of that kind, and not one that it was put in place of."""
        return self._tasks.get(kind) is asyncio.current_task()

    async def close(self) -> None:
        """Cancel all and wait for them; may be called twice."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, kind: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(kind) is task:
            del self._tasks[kind]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
            self._failed(error)
