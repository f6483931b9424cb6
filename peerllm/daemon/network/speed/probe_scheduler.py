"""When links are measured: new ones and those measured long ago, one at a time, and only while nothing else goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable

from peerllm.errors import PeerLLMError, UnavailableError
from peerllm.types import DeviceId

CHECK_S = 15.0  # how often it is looked whether something is due
BUSY_S = 1.0  # where this device or the other is busy it is tried again after this, longer as the device ids say
FAILED_S = 120.0  # a link that could not be measured is tried again after this

log = logging.getLogger(__name__)


class ProbeScheduler:
    """Runs `measure` for each device that is `due`. One measurement at a time, so that none disturbs another."""

    def __init__(
        self,
        measure: Callable[[DeviceId], Awaitable[None]],
        online: Callable[[], Iterable[DeviceId]],
        due: Callable[[DeviceId], bool],
        quiet: Callable[[], bool],
        patience: float = 1.0,
    ) -> None:
        """`patience`: by how much this device waits longer than others would, so that two do not collide for ever."""
        self.measuring = False
        self._measure, self._online, self._due, self._quiet = measure, online, due, quiet
        self._busy_s = BUSY_S * patience
        self._not_before: dict[DeviceId, float] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="network-bandwidth")

    def connected(self, device: DeviceId) -> None:
        """A link to the device stands: measure it unless that was done lately."""
        self._not_before.pop(device, None)
        self._wake.set()

    def keep_only(self, devices: Collection[DeviceId]) -> None:
        """Forget every other device."""
        self._not_before = {device: at for device, at in self._not_before.items() if device in devices}

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            soonest = min(self._not_before.values(), default=loop.time() + CHECK_S)
            try:
                async with asyncio.timeout(max(0.0, min(CHECK_S, soonest - loop.time()))):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            self._not_before = {device: at for device, at in self._not_before.items() if at > loop.time()}
            for device in list(self._online()):
                if not self._due(device) or device in self._not_before:
                    continue
                if self._quiet():
                    await self._one(device)
                else:  # the other end measures the same link just now, mostly
                    self._not_before[device] = loop.time() + self._busy_s

    async def _one(self, device: DeviceId) -> None:
        loop = asyncio.get_running_loop()
        self.measuring = True
        try:
            await self._measure(device)
        except UnavailableError:
            self._not_before[device] = loop.time() + self._busy_s
        except PeerLLMError as error:
            log.info("the link to %s was not measured: %s", device[:8], error)
            self._not_before[device] = loop.time() + FAILED_S
        finally:
            self.measuring = False
