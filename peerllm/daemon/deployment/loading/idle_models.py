"""Models that nobody asks for any more leave the household's memory, by themselves or where another needs it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from peerllm.daemon.background_tasks import BackgroundTasks
from peerllm.daemon.control_messages import DeploymentState, DeploymentView
from peerllm.daemon.decide.idle.idle_time import IdleTime
from peerllm.daemon.decide.idle.same_start import gives_way
from peerllm.daemon.deployment.figures.shown_deployment import ShownDeployment
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.facade import Chunk
from peerllm.errors import PeerLLMError
from peerllm.request_ids import caused_by
from peerllm.types import DeviceId

log = logging.getLogger(__name__)


class IdleDeployment(Protocol):
    """What is needed of a deployment."""

    idle: IdleTime
    lasting: bool  # it has served

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> DeploymentState: ...

    @property
    def makes_way(self) -> bool:
        """Whether a request started it and nobody uses it."""
        ...

    @property
    def busy(self) -> bool:
        """Whether an answer of it is under way."""
        ...

    def shown(self) -> ShownDeployment:
        """What others are told of it."""
        ...

    def promised(self) -> dict[DeviceId, int]:
        """Bytes that would be free without it."""
        ...


@dataclass(frozen=True, slots=True)
class Leaver:
    """A model that would make room: idle since then, by this clock; `leave` says whether it did."""

    since: float
    promised: dict[DeviceId, int]
    leave: Callable[[], Awaitable[bool]]


D = TypeVar("D", bound=IdleDeployment)


class IdleModels(Generic[D]):
    """`look` whenever something changed; `unload` ends a deployment."""

    def __init__(
        self,
        held: Callable[[], Iterable[D]],
        unload: Callable[[D], Awaitable[None]],
        others: Callable[[], Iterable[Leaver]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`others`: those that other devices coordinate."""
        self._held, self._unload, self._clock, self._others = held, unload, clock, others
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
                with caused_by(""):
                    self.leave(one, "nobody asks for it")
            else:
                next_due = due if next_due is None else min(due, next_due)
        if next_due is not None:
            self._timer = asyncio.get_running_loop().call_later(next_due - now, self.look)

    def leave(self, one: D, why: str) -> None:
        """Unload one, beside the loop. Idempotent."""
        if one not in self._ending:
            self._ending.append(one)
            self._tasks.start(self._end(one, why), f"unload {one.name}")

    def leave_to(self, others: Sequence[DeploymentView]) -> None:
        """Unload those that requests started and that another device serves, too, if that one goes on."""
        for one in self._held():
            may = one.idle.on_demand and (one.makes_way or not one.lasting)
            if may and gives_way(one.shown().view({}), one.makes_way, others):
                self.leave(one, "another device serves it")

    async def make_room(self, fits: Callable[[dict[DeviceId, int]], Awaitable[bool]]) -> bool:
        """Unload models that requests started and nobody uses, the longest idle first, until `fits` with their memory.

        False, and none is unloaded, where all of them would not do; False, too, where somebody asks for one meanwhile.
        """
        freed, leaving = dict[DeviceId, int](), list[Leaver]()
        for one in sorted([*map(self._leaver, self._idle()), *self._others()], key=lambda one: one.since):
            leaving.append(one)
            for device, nbytes in one.promised.items():
                freed[device] = freed.get(device, 0) + nbytes
            if await fits(freed):
                return all(await asyncio.gather(*(left.leave() for left in leaving)))
        return False

    async def make_way(self, one: D) -> bool:
        """Unload this one for another that needs its memory; False if it is used, or does not make way."""
        if one not in self._idle():
            return False
        self._ending.append(one)
        await self._end(one, "another model needs its memory")
        return True

    def _leaver(self, one: D) -> Leaver:
        return Leaver(one.idle.since, one.promised(), lambda: self.make_way(one))

    async def one_less(self) -> bool:
        """Unload the one that has been idle longest; False where there is none."""
        for one in self._idle():
            self._ending.append(one)
            await self._end(one, "another model takes its place")
            return True
        return False

    def _idle(self) -> list[D]:
        found = [one for one in self._held() if one.makes_way]
        return sorted((one for one in found if one not in self._ending), key=lambda one: one.idle.since)

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


async def kept_loaded(
    idle: IdleTime, keep_s: float | None, chunks: AsyncGenerator[Chunk], look: Callable[[], None]
) -> AsyncGenerator[Chunk]:
    """An answer, meanwhile and after which its deployment stays; `look` is called at its end."""
    idle.asked(keep_s, time.monotonic())
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
    finally:
        idle.over(time.monotonic())
        look()


def leavers(around: Surroundings) -> list[Leaver]:
    """The models of other devices that make way."""

    def asked(view: DeploymentView) -> Callable[[], Awaitable[bool]]:
        async def leave() -> bool:
            try:
                await around.make_way(view.coordinator, view.deployment)
            except PeerLLMError as error:
                log.info("%s does not make way: %s", view.name, error)
                return False
            return True

        return leave

    found, now = [], time.monotonic()
    for view in around.views():
        if view.idle_since:
            promised = dict[DeviceId, int]()
            for stage, nbytes in zip(view.stages, view.stage_memory_bytes, strict=False):
                promised[stage.device] = promised.get(stage.device, 0) + nbytes
            found.append(Leaver(now - max(0.0, time.time() - view.idle_since), promised, asked(view)))
    return found
