"""This device's side of deployments: promises memory, fetches and loads what it is assigned, lets go again.

A deployment obeys the one coordinator that reserved for it, and its epochs only grow. Several may stand side by side;
shards that they share are in memory once. What is loaded stays until its coordinator releases it, a reservation needs
the room of one whose coordinator is away, or a coordinator has been away for GRACE_S.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, assert_never

from peerllm.daemon.control_messages import (
    Activate,
    Answer,
    Assign,
    Carry,
    Computing,
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
from peerllm.daemon.deployment.loading.coordinator_grace import CoordinatorGrace
from peerllm.daemon.deployment.loading.device_holdings import DeviceHoldings
from peerllm.daemon.deployment.loading.epoch_loading import QUERY_TIMEOUT_S, EpochLoading, Fetcher, LoadingEngine
from peerllm.daemon.deployment.loading.held_deployment import HeldEpoch
from peerllm.engine.messages import (
    CarryState,
    Connect,
    EngineLoad,
    LinkLost,
    LoadProgress,
    QueryLoad,
    Record,
    Recorded,
)
from peerllm.errors import EngineError, PeerLLMError, RefusedError, UnavailableError
from peerllm.request_ids import caused_by, is_plain
from peerllm.types import DeploymentId, DeviceId

CONNECT_TIMEOUT_S = 20.0
CARRY_TIMEOUT_S = 60.0

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
        self._me, self.ledger, self._engine = me, ledger, engine
        self._profiler = profiler
        self._loading = EpochLoading(me, ledger, engine, weights, address, report)
        self._report, self._changed = report, changed
        self._held = DeviceHoldings(ledger, engine, weights, changed)
        self._grace = CoordinatorGrace(self._held.coordinators, self._held.let_go_for)
        self._reserving = asyncio.Lock()
        self._lapsing: asyncio.TimerHandle | None = None

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
        return self._held.holdings()

    # ---- what happens ---------------------------------------------------------------------------------------------

    def obey(self, deployment: DeploymentId, coordinator: DeviceId) -> None:
        """A deployment has another coordinator: what is loaded for it obeys that one."""
        held = self._held.find(deployment)
        if held is not None and held.coordinator != coordinator:
            log.info("%s obeys %s now", deployment[:8], coordinator[:8])
            held.coordinator = coordinator
        self.ledger.hand_over(deployment, coordinator)

    async def let_go(self, deployment: DeploymentId) -> None:
        """Unload what is held of a deployment, whoever coordinates it."""
        if (held := self._held.find(deployment)) is not None:
            await self._held.let_go(held)

    def away(self, device: DeviceId) -> None:
        """A device is silent or gone: what it holds here as a coordinator is kept for GRACE_S."""
        self._grace.away(device)

    def back(self, device: DeviceId) -> None:
        """The device is online: its grace ends."""
        self._grace.back(device)

    def engine_lost(self, reason: str) -> None:
        """The engine died and its memory with it: tell every coordinator that had something here."""
        for held in self._held.all():
            for epoch in list(held.epochs.values()):
                epoch.over = reason
                if epoch.task is not None:
                    epoch.task.cancel()
                self._report(held.coordinator, Trouble(held.deployment, epoch.number, reason, engine_died=True))
                self._held.drop(held, epoch)

    def link_lost(self, event: LinkLost) -> None:
        """A data link of a deployment broke."""
        held = self._held.find(event.deployment)
        if held is not None:
            self._report(held.coordinator, Trouble(event.deployment, event.epoch, event.reason, other=event.device))

    def computing(self, sender: DeviceId, told: Computing) -> None:
        """What the engine computes for which request: a line in the log, if it is of the deployment's coordinator."""
        held = self._held.of(told.deployment, sender)
        if held is not None and is_plain(told.request):
            with caused_by(told.request):
                log.info("sequence %d of %s is computed here", told.sequence, told.deployment[:8])

    def progress(self, event: LoadProgress) -> None:
        """The engine has read so much of a stage."""
        held = self._held.find(event.deployment)
        if held is not None:
            self._loading.progressed(held, event.stage, event.done_bytes)

    async def close(self) -> None:
        """Let go of everything; may be called twice."""
        await self._profiler.close()
        if self._lapsing is not None:
            self._lapsing.cancel()
        await self._grace.close()
        for held in self._held.all():
            await self._held.let_go(held)

    async def let_go_all(self, reason: str) -> None:
        """The owner's limits allow nothing: unload everything and tell the coordinators why."""
        for held in self._held.all():
            number = held.last_epoch
            for epoch in held.epochs.values():
                epoch.over = reason
            await self._held.let_go(held)
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
        long_away = self._grace.evictable()
        graced = [h for h in self._held.all() if h.coordinator in long_away and h.deployment != asked.deployment]
        if self.ledger.leaving or needed > self.ledger.free_bytes + sum(
            self.ledger.promised_to(held.deployment) for held in graced
        ):
            return False
        for held in sorted(graced, key=lambda one: long_away.index(one.coordinator)):
            if needed <= self.ledger.free_bytes:
                break
            log.info("%s is let go of: its coordinator is away and the room is needed", held.deployment[:8])
            await self._held.let_go(held)
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
        held = self._held.find(assign.deployment)
        if held is not None:
            if held.coordinator != sender:
                raise RefusedError("this deployment obeys another coordinator")
            if held.last_epoch >= assign.epoch:
                raise RefusedError(f"epoch {assign.epoch} of this deployment is over or loading already")
        promise = self.ledger.promise(assign.deployment, assign.epoch)
        if promise is not None and promise.coordinator == sender:
            check(assign, promise.nbytes, sender == self._me)
            links = sum(links_of(epoch.assign) for epoch in self._held.epochs_of(sender))
            if links + links_of(assign) > MAX_LINKS:
                raise RefusedError(f"{links} links are expected for you already; {MAX_LINKS} is the most")
        self.ledger.commit(assign.deployment, assign.epoch, sender, time.monotonic())
        held = self._held.begin(assign.deployment, sender)
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
        await self._held.let_go(held, (assign.epoch,))
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

    def _loaded(self, sender: DeviceId, deployment: DeploymentId, number: int) -> None:
        """RefusedError unless that epoch is loaded here for the sender."""
        held = self._held.of(deployment, sender)
        epoch = held.epochs.get(number) if held is not None else None
        if epoch is None or not epoch.loaded:
            raise RefusedError("nothing is loaded here for this epoch")

    async def _release(self, sender: DeviceId, asked: Release) -> None:
        held = self._held.find(asked.deployment)
        owners = {p.coordinator for p in self.ledger.promises() if p.deployment == asked.deployment}
        if held is not None:
            owners.add(held.coordinator)
        if owners - {sender}:
            raise RefusedError("this deployment obeys another coordinator")
        if held is not None:
            over = [one for one in held.epochs if (one == asked.epoch if asked.only else one <= asked.epoch)]
            await self._held.let_go(held, over)
        self.ledger.release(asked.deployment, asked.epoch, sender, asked.only)
        self._changed()

    async def _paces(self, sender: DeviceId, deployment: DeploymentId) -> Answer:
        """By stage of that deployment here: (sequences in a batch of steps, milliseconds), and how far they vary."""
        if self._held.of(deployment, sender) is None:
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
        if self._held.of(asked.deployment, sender) is None:
            raise RefusedError("only its coordinator hears what a deployment's stages do when")
        record = Record(self._engine.next_request(), asked.deployment, asked.want)
        recorded = await self._engine.ask(record, QUERY_TIMEOUT_S)
        if not isinstance(recorded, Recorded):
            raise EngineError("the engine does not say what it recorded")
        return recorded
