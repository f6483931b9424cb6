"""How fast the links are: measured once after connecting, then seldom and only while nothing else is going on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable

from peerllm.errors import PeerLLMError
from peerllm.types import DeviceId

FRESH_S = 600.0  # a measurement counts this long
CHECK_S = 60.0  # how often it is looked whether one is due
MAX_WAITING = 256  # devices waiting to be measured

log = logging.getLogger(__name__)


class Bandwidth:
    """Megabits per second from each device to this one. One measurement at a time, so that none disturbs another."""

    def __init__(
        self,
        measure: Callable[[DeviceId], Awaitable[float]],
        online: Callable[[], Iterable[DeviceId]],
        idle: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        self.mbps: dict[DeviceId, float] = {}
        self._measure = measure
        self._online = online
        self._idle = idle
        self._on_change = on_change
        self._at: dict[DeviceId, float] = {}
        self._due: asyncio.Queue[DeviceId] = asyncio.Queue(MAX_WAITING)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="network-bandwidth")

    def connected(self, device: DeviceId) -> None:
        """A link to the device stands: measure it unless that was done lately."""
        if self._stale(device) and not self._due.full():
            self._due.put_nowait(device)

    def keep_only(self, devices: Collection[DeviceId]) -> None:
        """Forget every other device."""
        for table in (self.mbps, self._at):
            for device in [device for device in table if device not in devices]:
                del table[device]

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _stale(self, device: DeviceId) -> bool:
        now = asyncio.get_running_loop().time()
        return now - self._at.get(device, -FRESH_S) >= FRESH_S

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(CHECK_S):
                    due = [await self._due.get()]
            except TimeoutError:
                due = [device for device in self._online() if self._stale(device)] if self._idle() else []
            for device in due:
                if self._stale(device):
                    await self._one(device)

    async def _one(self, device: DeviceId) -> None:
        try:
            self.mbps[device] = await self._measure(device)
        except PeerLLMError as error:
            log.info("the link to %s was not measured: %s", device[:8], error)
            return
        self._at[device] = asyncio.get_running_loop().time()
        self._on_change()
