"""This device's side of deployments: promises memory, fetches and loads what it is assigned, lets go again.

A deployment obeys the one coordinator that reserved for it, and its epochs only grow. Several may stand side by side;
shards that they share are in memory once. What is loaded stays until its coordinator releases it, a reservation needs
the room of one whose coordinator is away, or a coordinator has been away for GRACE_S.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, assert_never

from peerllm.daemon.control_messages import (
    Activate,
    Answer,
    Assign,
    Carry,
    Holding,
    LoadQuestion,
    Pace,
    Profile,
    Progress,
    Release,
    Reserve,
    Trace,
    Trouble,
)
from peerllm.daemon.decide.assignments import MAX_LINKS, Address, check, links_of
from peerllm.daemon.decide.ledger import Ledger, added_to
from peerllm.daemon.decide.membership import GRACE_S
from peerllm.daemon.deployment.loading.epoch_loading import (
    QUERY_TIMEOUT_S,
    UNLOAD_TIMEOUT_S,
    EpochLoading,
    Fetcher,
    LoadingEngine,
)
from peerllm.daemon.deployment.loading.held_deployment import HeldDeployment, HeldEpoch
from peerllm.engine.messages import (
    CarryState,
    Connect,
    EngineLoad,
    LinkLost,
    LoadProgress,
    QueryLoad,
    Record,
    Recorded,
    Unload,
)
from peerllm.errors import EngineError, LinkError, PeerLLMError, RefusedError, UnavailableError
from peerllm.types import DeploymentId, DeviceId

CONNECT_TIMEOUT_S = 20.0
CARRY_TIMEOUT_S = 60.0
EVICTABLE_S = 5.0  # a coordinator that is away for less keeps the room of its shards: a blip must not cost a reload

log = logging.getLogger(__name__)


class ProfileAnswers(Protocol):
    """Who answers how long layers take here; raises what stands against it."""

    async def answer(self, question: Profile) -> Answer: ...

    async def close(self) -> None: ...


class Worker:
    """`report` tells a coordinator (this device's own, too); `changed` is called when what is promised changes."""

    def __init__(
        self,
        me: DeviceId,
        ledger: Ledger,
        engine: LoadingEngine,
        weights: Fetcher,
        profiler: ProfileAnswers,
        *,
        address: Callable[[DeviceId], Address],
        report: Callable[[DeviceId, Progress | Trouble], None],
        changed: Callable[[], None],
    ) -> None:
        self._me, self.ledger, self._engine, self._weights = me, ledger, engine, weights
        self._profiler = profiler
        self._loading = EpochLoading(me, ledger, engine, weights, address, report)
        self._report, self._changed = report, changed
        self._held: dict[DeploymentId, HeldDeployment] = {}
        self._reserving = asyncio.Lock()
        self._away: dict[DeviceId, float] = {}  # coordinators, and when they were last online
        self._lapsing: asyncio.TimerHandle | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def answer(self, sender: DeviceId, question: LoadQuestion) -> Answer:
        """Do what a coordinator asks; what stands against it is the answer's error, never raised."""
        try:
            match question:
                case Reserve():
                    await self._reserve(sender, question)
                case Assign():
                    await self._assign(sender, question)
                case Activate():
                    await self._activate(sender, question)
                case Carry():
                    await self._carry(sender, question)
                case Release():
                    await self._release(sender, question)
                case Profile():
                    found = await self._profiler.answer(question)
                    return replace(found, free_bytes=max(0, self.ledger.free_bytes))
                case Pace(deployment):
                    return await self._paces(sender, deployment)
                case Trace():
                    return Answer(0, recorded=await self._record(sender, question))
                case _:
                    assert_never(question)
        except PeerLLMError as error:
            return Answer(0, type(error).__name__, str(error), max(0, self.ledger.free_bytes))
        return Answer(0, free_bytes=max(0, self.ledger.free_bytes))

    def holdings(self) -> tuple[Holding, ...]:
        """All that is loaded here, for everyone to see."""
        return tuple(one for deployment in sorted(self._held) for one in self._held[deployment].holdings())

    # ---- what happens ---------------------------------------------------------------------------------------------

    def obey(self, deployment: DeploymentId, coordinator: DeviceId) -> None:
        """A deployment has another coordinator, which what is loaded for it obeys from now on."""
        held = self._held.get(deployment)
        if held is not None and held.coordinator != coordinator:
            log.info("%s obeys %s now", deployment[:8], coordinator[:8])
            held.coordinator = coordinator
        self.ledger.hand_over(deployment, coordinator)

    async def let_go(self, deployment: DeploymentId) -> None:
        """Unload what is held of a deployment, whoever coordinates it."""
        if (held := self._held.get(deployment)) is not None:
            await self._let_go(held, held.epochs)

    def away(self, device: DeviceId) -> None:
        """A device is not heard of any more: what it holds here as a coordinator is kept for GRACE_S."""
        self._away.setdefault(device, time.monotonic())
        self._see_to_grace()

    def back(self, device: DeviceId) -> None:
        """The device is online: what it holds here is its own again."""
        self._away.pop(device, None)

    def engine_lost(self, reason: str) -> None:
        """The engine died and its memory with it: tell every coordinator that had something here."""
        for held in list(self._held.values()):
            for epoch in list(held.epochs.values()):
                epoch.over = reason
                if epoch.task is not None:
                    epoch.task.cancel()
                self._report(held.coordinator, Trouble(held.deployment, epoch.number, reason, engine_died=True))
                self._drop(held, epoch)

    def link_lost(self, event: LinkLost) -> None:
        """A data link of a deployment broke."""
        held = self._held.get(event.deployment)
        if held is not None:
            self._report(held.coordinator, Trouble(event.deployment, event.epoch, event.reason, other=event.device))

    def progress(self, event: LoadProgress) -> None:
        """The engine has read so much of a stage."""
        held = self._held.get(event.deployment)
        if held is not None:
            self._loading.progressed(held, event.stage, event.done_bytes)

    async def close(self) -> None:
        """Let go of everything; may be called twice."""
        await self._profiler.close()
        for timer in (self._lapsing, self._grace):
            if timer is not None:
                timer.cancel()
        for task in self._ending:
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        for held in list(self._held.values()):
            await self._let_go(held, held.epochs)

    async def let_go_all(self, reason: str) -> None:
        """The owner's limits allow nothing any more: unload everything and tell the coordinators why."""
        for held in list(self._held.values()):
            number = held.last_epoch
            for epoch in held.epochs.values():
                epoch.over = reason
            await self._let_go(held, held.epochs)
            self._report(held.coordinator, Trouble(held.deployment, number, reason, engine_died=True))
        for promise in self.ledger.promises():  # of what was not loaded yet
            self.ledger.release(promise.deployment, promise.epoch, promise.coordinator)
        self._changed()

    # ---- the questions ---------------------------------------------------------------------------------------

    async def _reserve(self, sender: DeviceId, asked: Reserve) -> None:
        async with self._reserving:
            try:
                self.ledger.reserve(asked, sender, time.monotonic())
            except RefusedError:
                if not await self._made_room(asked):
                    raise
                self.ledger.reserve(asked, sender, time.monotonic())
        self._lapse()
        self._changed()

    async def _made_room(self, asked: Reserve) -> bool:
        """Whether memory was freed of deployments whose coordinators are away for EVICTABLE_S, the longest first."""
        needed = added_to(self.ledger.promised_to(asked.deployment), asked.nbytes, asked.added_bytes)
        long_away = {device for device, since in self._away.items() if time.monotonic() - since >= EVICTABLE_S}
        graced = [h for h in self._held.values() if h.coordinator in long_away and h.deployment != asked.deployment]
        if self.ledger.leaving or needed > self.ledger.free_bytes + sum(
            self.ledger.promised_to(held.deployment) for held in graced
        ):
            return False
        for held in sorted(graced, key=lambda one: self._away.get(one.coordinator, 0.0)):
            if needed <= self.ledger.free_bytes:
                break
            log.info("%s is let go of: its coordinator is away and the room is needed", held.deployment[:8])
            await self._let_go(held, held.epochs)
        return bool(graced)

    def _lapse(self) -> None:
        now = time.monotonic()
        if self.ledger.lapse(now):
            self._changed()
        if self._lapsing is not None:
            self._lapsing.cancel()
        due = [promise.until for promise in self.ledger.promises() if promise.until is not None]
        if due:
            self._lapsing = asyncio.get_running_loop().call_later(max(0.0, min(due) - now), self._lapse)

    async def _assign(self, sender: DeviceId, assign: Assign) -> None:
        held = self._held.get(assign.deployment)
        if held is not None:
            if held.coordinator != sender:
                raise RefusedError("this deployment obeys another coordinator")
            if held.last_epoch >= assign.epoch:
                raise RefusedError(f"epoch {assign.epoch} of this deployment is over or loading already")
        promise = self.ledger.promise(assign.deployment, assign.epoch)
        if promise is not None and promise.coordinator == sender:
            check(assign, promise.nbytes, sender == self._me)
            held_links = sum(links_of(one.assign) for one in self._epochs_of(sender))
            if held_links + links_of(assign) > MAX_LINKS:
                raise RefusedError(f"{held_links} links are expected for you already; {MAX_LINKS} is the most")
        self.ledger.commit(assign.deployment, assign.epoch, sender, time.monotonic())
        held = self._held.setdefault(assign.deployment, HeldDeployment(assign.deployment, sender))
        epoch = held.epochs[assign.epoch] = HeldEpoch(assign)
        task = epoch.task = asyncio.create_task(
            self._loading.load(held, epoch), name=f"load {assign.deployment[:8]}/{assign.epoch}"
        )
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise UnavailableError(epoch.over)
        error = task.exception()
        if error is None:
            self._changed()
            return
        await self._let_go(held, (assign.epoch,))
        if isinstance(error, PeerLLMError):
            raise error
        log.error("loading %s failed", assign.model, exc_info=error)
        raise EngineError(f"loading failed: {error}") from error

    async def _activate(self, sender: DeviceId, asked: Activate) -> None:
        self._loaded(sender, asked.deployment, asked.epoch)
        await self._engine.ask(Connect(self._engine.next_request(), asked.deployment, asked.epoch), CONNECT_TIMEOUT_S)

    async def _carry(self, sender: DeviceId, asked: Carry) -> None:
        self._loaded(sender, asked.deployment, asked.epoch)
        to = self._loading.hop(asked.to_device, asked.to_hosts, asked.to_port, asked.to_stage)
        layers = asked.first_layer, asked.last_layer
        state = CarryState(
            self._engine.next_request(), asked.deployment, asked.epoch, *layers, to_epoch=asked.to_epoch, to=to
        )
        await self._engine.ask(state, CARRY_TIMEOUT_S)

    def _epochs_of(self, coordinator: DeviceId) -> Iterable[HeldEpoch]:
        return (one for held in self._held.values() if held.coordinator == coordinator for one in held.epochs.values())

    def _loaded(self, sender: DeviceId, deployment: DeploymentId, number: int) -> None:
        """RefusedError unless that epoch is loaded here for the sender."""
        held = self._held.get(deployment)
        epoch = held.epochs.get(number) if held is not None and held.coordinator == sender else None
        if epoch is None or not epoch.loaded:
            raise RefusedError("nothing is loaded here for this epoch")

    async def _release(self, sender: DeviceId, asked: Release) -> None:
        held = self._held.get(asked.deployment)
        owners = {p.coordinator for p in self.ledger.promises() if p.deployment == asked.deployment}
        if held is not None:
            owners.add(held.coordinator)
        if owners - {sender}:
            raise RefusedError("this deployment obeys another coordinator")
        if held is not None:
            over = [one for one in held.epochs if (one == asked.epoch if asked.only else one <= asked.epoch)]
            await self._let_go(held, over)
        self.ledger.release(asked.deployment, asked.epoch, sender, asked.only)
        self._changed()

    async def _paces(self, sender: DeviceId, deployment: DeploymentId) -> Answer:
        """By stage of that deployment here: (sequences in a batch of steps, milliseconds), and how far they vary."""
        held = self._held.get(deployment)
        if held is None or held.coordinator != sender:
            raise RefusedError("only its coordinator hears how a deployment's stages do")
        load = await self._engine.ask(QueryLoad(self._engine.next_request()), QUERY_TIMEOUT_S)
        if not isinstance(load, EngineLoad):
            return Answer(0)
        paces = {str(index): load.paces.get(f"{one}/{index}", ()) for one, index, _ in load.stages if one == deployment}
        return Answer(
            0,
            stage_ms={index: tuple((size, ms) for size, ms, _ in told) for index, told in paces.items()},
            stage_spread={index: tuple((size, off) for size, _, off in told if off) for index, told in paces.items()},
        )

    async def _record(self, sender: DeviceId, asked: Trace) -> Recorded:
        held = self._held.get(asked.deployment)
        if held is None or held.coordinator != sender:
            raise RefusedError("only its coordinator hears what a deployment's stages do when")
        record = Record(self._engine.next_request(), asked.deployment, asked.want)
        recorded = await self._engine.ask(record, QUERY_TIMEOUT_S)
        if not isinstance(recorded, Recorded):
            raise EngineError("the engine does not say what it recorded")
        return recorded

    # ---- letting go -----------------------------------------------------------------------------------------------

    def _see_to_grace(self) -> None:
        """Let go of what coordinators hold that have been away for GRACE_S; come back when the next is due."""
        now = time.monotonic()
        owners = {held.coordinator for held in self._held.values()}
        owners |= {promise.coordinator for promise in self.ledger.promises()}
        self._away = {device: since for device, since in self._away.items() if device in owners}
        for device in [device for device, since in self._away.items() if now - since >= GRACE_S]:
            del self._away[device]
            task = asyncio.create_task(self._end_all_of(device), name=f"let go for {device[:8]}")
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        if self._grace is not None:
            self._grace.cancel()
        if self._away:
            due = min(self._away.values()) + GRACE_S
            self._grace = asyncio.get_running_loop().call_later(max(0.0, due - now), self._see_to_grace)

    async def _end_all_of(self, coordinator: DeviceId) -> None:
        for held in [held for held in self._held.values() if held.coordinator == coordinator]:
            await self._let_go(held, held.epochs)
        for promise in self.ledger.promises():
            if promise.coordinator == coordinator and promise.deployment not in self._held:
                self.ledger.release(promise.deployment, promise.epoch, coordinator)
        self._changed()

    async def _let_go(self, held: HeldDeployment, numbers: Iterable[int]) -> None:
        """Stop loading, unload, then take the promises back: memory is never promised while it is still taken."""
        async with held.lock:
            epochs = [held.epochs[number] for number in sorted(numbers) if number in held.epochs]
            tasks = {one.task for one in epochs if one.task is not None and one.task is not asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            loads = {one.load for one in epochs if one.load is not None}
            if loads:
                try:
                    await self._engine.ask(self._unload(held, epochs), UNLOAD_TIMEOUT_S)
                    await asyncio.wait(loads, timeout=UNLOAD_TIMEOUT_S)
                except (EngineError, LinkError, TimeoutError) as error:
                    log.warning("unloading %s: %s", held.deployment[:8], error)  # a dead engine holds nothing
                for load in loads:
                    load.cancel()
            for epoch in epochs:
                self._drop(held, epoch)

    def _unload(self, held: HeldDeployment, epochs: list[HeldEpoch]) -> Unload:
        """For these epochs, which are the only ones, the earliest, or one alone."""
        request, rest = self._engine.next_request(), held.epochs.keys() - {one.number for one in epochs}
        if not rest:
            return Unload(request, held.deployment)
        last = epochs[-1].number
        return Unload(request, held.deployment, last, only=min(rest) < last)

    def _drop(self, held: HeldDeployment, epoch: HeldEpoch) -> None:
        if held.epochs.get(epoch.number) is not epoch:  # let go of already
            return
        held.ended(epoch.number)
        if not held.epochs and self._held.get(held.deployment) is held:
            del self._held[held.deployment]
            self._weights.forget(held.deployment)
        self.ledger.release(held.deployment, epoch.number, held.coordinator, only=True)
        self._changed()
