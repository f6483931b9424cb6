"""Models that nobody asks for any more leave the household's memory, by themselves or where another needs it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, Protocol, TypeVar

from peerllm.daemon.background_tasks import BackgroundTasks
from peerllm.daemon.control_messages import DeploymentState
from peerllm.daemon.decide.idle_time import IdleTime
from peerllm.types import DeviceId

log = logging.getLogger(__name__)


class IdleDeployment(Protocol):
    """What is needed of a deployment."""

    idle: IdleTime

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> DeploymentState: ...

    @property
    def busy(self) -> bool:
        """Whether an answer of it is under way."""
        ...

    def promised(self) -> dict[DeviceId, int]:
        """Bytes that would be free without it."""
        ...


D = TypeVar("D", bound=IdleDeployment)


class IdleModels(Generic[D]):
    """`look` whenever something changed; `unload` ends a deployment."""

    def __init__(
        self, held: Callable[[], Iterable[D]], unload: Callable[[D], Awaitable[None]], clock: Callable[[], float]
    ) -> None:
        self._held, self._unload, self._clock = held, unload, clock
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = BackgroundTasks()
        self._ending: list[D] = []

    def look(self) -> None:
        """Unload what is due, and look again when the next one is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now, next_due = self._clock(), None
        for one in list(self._held()):
            due = None if one.busy or one in self._ending else one.idle.due(one.state == "serving")
            if due is None:
                continue
            if due <= now:
                self._ending.append(one)
                self._tasks.start(self._end(one, "nobody asks for it"), f"unload {one.name}")
            else:
                next_due = due if next_due is None else min(due, next_due)
        if next_due is not None:
            self._timer = asyncio.get_running_loop().call_later(next_due - now, self.look)

    async def make_room(self, fits: Callable[[dict[DeviceId, int]], Awaitable[bool]]) -> bool:
        """Unload models that requests started and nobody uses, the longest idle first, until `fits` with their memory.

        False, and none is unloaded, where all of them would not do.
        """
        freed, leaving = dict[DeviceId, int](), list[D]()
        for one in self._idle():
            leaving.append(one)
            for device, nbytes in one.promised().items():
                freed[device] = freed.get(device, 0) + nbytes
            if await fits(freed):
                still = [left for left in leaving if left in self._idle()]
                if len(still) < len(leaving):  # somebody asked for one meanwhile
                    return False
                self._ending += still
                await asyncio.gather(*(self._end(left, "another model needs its memory") for left in still))
                return True
        return False

    async def one_less(self) -> bool:
        """Unload the one that has been idle longest; False where there is none."""
        for one in self._idle():
            self._ending.append(one)
            await self._end(one, "another model takes its place")
            return True
        return False

    def _idle(self) -> list[D]:
        found = [one for one in self._held() if one.idle.on_demand and not one.busy and not one.idle.answers]
        served = [one for one in found if one.state in ("serving", "waiting") and one not in self._ending]
        return sorted(served, key=lambda one: one.idle.since)

    async def _end(self, one: D, why: str) -> None:
        log.info("%s is unloaded: %s", one.name, why)
        try:
            await self._unload(one)
        finally:
            self._ending.remove(one)

    async def close(self) -> None:
        """May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close()


def expiry(idle: IdleTime, now: float) -> int:
    """Unix seconds at which a model is unloaded if nobody asks again; 0: never."""
    return 0 if idle.kept_s < 0 else int(time.time() + idle.since + idle.kept_s - now)
