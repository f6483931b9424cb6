"""How long what a coordinator holds here is kept while that device is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from peerllm.daemon.background_tasks import BackgroundTasks
from peerllm.daemon.decide.membership import GRACE_S
from peerllm.types import DeviceId

EVICTABLE_S = 5.0  # a coordinator that is away for less keeps the room of its shards: a blip must not cost a reload


class CoordinatorGrace:
    """`over` is called with each of the `coordinators` that has been away for GRACE_S."""

    def __init__(
        self, coordinators: Callable[[], set[DeviceId]], over: Callable[[DeviceId], Coroutine[Any, Any, None]]
    ) -> None:
        self._coordinators, self._over = coordinators, over
        self._away: dict[DeviceId, float] = {}  # when they were last online
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = BackgroundTasks()

    def away(self, device: DeviceId) -> None:
        """The device is silent or gone."""
        self._away.setdefault(device, time.monotonic())
        self._look()

    def back(self, device: DeviceId) -> None:
        """The device is online."""
        self._away.pop(device, None)

    def evictable(self) -> list[DeviceId]:
        """Who has been away for EVICTABLE_S, the longest first."""
        now = time.monotonic()
        found = [device for device, since in self._away.items() if now - since >= EVICTABLE_S]
        return sorted(found, key=lambda device: self._away[device])

    async def close(self) -> None:
        """May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close()

    def _look(self) -> None:
        """Whose grace is over; come back when the next one's is."""
        now, coordinators = time.monotonic(), self._coordinators()
        self._away = {device: since for device, since in self._away.items() if device in coordinators}
        for device in [device for device, since in self._away.items() if now - since >= GRACE_S]:
            del self._away[device]
            self._tasks.start(self._over(device), f"let go for {device[:8]}")
        if self._timer is not None:
            self._timer.cancel()
        if self._away:
            due = min(self._away.values()) + GRACE_S
            self._timer = asyncio.get_running_loop().call_later(max(0.0, due - now), self._look)
