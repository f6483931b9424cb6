"""This device's side of a deployment: promises memory, fetches and loads what it is assigned, lets go again.

A deployment obeys the one coordinator that reserved for it, and its epochs only grow. What a vanished coordinator holds
here is let go by itself, so nothing stays behind that nobody answers for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, assert_never

from peerllm.daemon.control_messages import (
    Activate,
    Answer,
    Assign,
    Have,
    Pace,
    Profile,
    Progress,
    Question,
    Release,
    Reserve,
    StageWork,
    Trace,
    Trouble,
)
from peerllm.daemon.decide.assignments import Address, check, weight_bytes
from peerllm.daemon.decide.ledger import Ledger
from peerllm.engine.messages import (
    Connect,
    EngineLoad,
    Hop,
    LinkLost,
    LoadProgress,
    LoadStage,
    QueryLoad,
    Record,
    Recorded,
    TensorAt,
    Unload,
)
from peerllm.errors import EngineError, LinkError, PeerLLMError, RefusedError, UnavailableError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import DeploymentId, DeviceId

LOAD_TIMEOUT_S = 3600.0  # one stage from disk
CONNECT_TIMEOUT_S = 20.0
UNLOAD_TIMEOUT_S = 30.0
QUERY_TIMEOUT_S = 10.0
MAX_HOSTS = 16  # addresses tried for the next device
PROGRESS_S = 0.1  # between two Progress of one deployment

log = logging.getLogger(__name__)


class LoadingEngine(Protocol):
    """What the worker needs of the engine's host."""

    def next_request(self) -> int: ...

    async def ask(self, message: object, timeout_s: float) -> object: ...


class ProfileAnswers(Protocol):
    """Who answers how long layers take here; raises what stands against it."""

    async def answer(self, question: Profile) -> Answer: ...

    async def close(self) -> None: ...


class Fetcher(Protocol):
    """What the worker needs of weights (StageWeights)."""

    async def fetch(
        self, assign: Assign, coordinator: DeviceId, told: Callable[[Literal["fetch", "check"], int, int], None]
    ) -> dict[str, TensorAt]: ...

    async def verify(
        self, tensors: Iterable[TensorAt], told: Callable[[Literal["fetch", "check"], int, int], None]
    ) -> bool: ...

    def forget(self, deployment: DeploymentId) -> None: ...


@dataclass(slots=True)
class _HeldDeployment:
    """One deployment on this device; `task` loads it, `load` is the engine's part of that."""

    epoch: int
    coordinator: DeviceId
    task: asyncio.Task[None] | None = None
    load: asyncio.Task[object] | None = None
    loaded: bool = False
    total_bytes: int = 1
    done: dict[int, int] = field(default_factory=dict)  # stage: bytes read
    told: float = 0.0
    over: str = "the deployment was released while it was loading"
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


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
        self._address = address
        self._report, self._changed = report, changed
        self._held: dict[DeploymentId, _HeldDeployment] = {}
        self._lapsing: asyncio.TimerHandle | None = None

    async def answer(self, sender: DeviceId, question: Question) -> Answer:
        """Do what a coordinator asks; what stands against it is the answer's error, never raised."""
        try:
            match question:
                case Reserve():
                    self._reserve(sender, question)
                case Assign():
                    await self._assign(sender, question)
                case Activate():
                    await self._activate(sender, question)
                case Release():
                    await self._release(sender, question)
                case Profile():
                    found = await self._profiler.answer(question)
                    return replace(found, free_bytes=max(0, self.ledger.free_bytes))
                case Pace(deployment):
                    return await self._paces(sender, deployment)
                case Trace():
                    return Answer(0, recorded=await self._record(sender, question))
                case Have():
                    return Answer(0)  # answered by Offers
                case _:
                    assert_never(question)
        except PeerLLMError as error:
            return Answer(0, type(error).__name__, str(error), max(0, self.ledger.free_bytes))
        return Answer(0, free_bytes=max(0, self.ledger.free_bytes))

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

    async def vanished(self, device: DeviceId) -> None:
        """A coordinator is gone: let go of all it holds here."""
        theirs = {deployment: held.epoch for deployment, held in self._held.items() if held.coordinator == device}
        for deployment, epoch in theirs.items():  # each may be released by others meanwhile
            await self._let_go(deployment, epoch)
        for promise in self.ledger.promises():
            if promise.coordinator == device and promise.deployment not in theirs:
                self.ledger.release(promise.deployment, promise.epoch, device)
        self._changed()

    def engine_lost(self, reason: str) -> None:
        """The engine died and its memory with it: tell every coordinator that had something here."""
        for deployment, held in list(self._held.items()):
            held.over = reason
            if held.task is not None:
                held.task.cancel()
            self._drop(deployment, held)
            self._report(held.coordinator, Trouble(deployment, held.epoch, reason, engine_died=True))

    def link_lost(self, event: LinkLost) -> None:
        held = self._held.get(event.deployment)
        if held is not None:
            self._report(held.coordinator, Trouble(event.deployment, held.epoch, event.reason))

    def progress(self, event: LoadProgress) -> None:
        held = self._held.get(event.deployment)
        if held is not None and not held.loaded:
            held.done[event.stage] = event.done_bytes
            self._tell(event.deployment, held, "load", sum(held.done.values()))

    async def close(self) -> None:
        """Let go of everything; may be called twice."""
        await self._profiler.close()
        if self._lapsing is not None:
            self._lapsing.cancel()
        for deployment, held in list(self._held.items()):
            await self._let_go(deployment, held.epoch)

    async def let_go_all(self, reason: str) -> None:
        """The owner's limits allow nothing any more: unload everything and tell the coordinators why."""
        for deployment, held in list(self._held.items()):
            held.over = reason
            await self._let_go(deployment, held.epoch)
            self._report(held.coordinator, Trouble(deployment, held.epoch, reason))
        for promise in self.ledger.promises():  # of what was not loaded yet
            self.ledger.release(promise.deployment, promise.epoch, promise.coordinator)
        self._changed()

    # ---- the questions ---------------------------------------------------------------------------------------

    def _reserve(self, sender: DeviceId, asked: Reserve) -> None:
        self.ledger.reserve(asked, sender, time.monotonic())
        if self._lapsing is not None:
            self._lapsing.cancel()
        self._lapse()
        self._changed()

    def _lapse(self) -> None:
        now = time.monotonic()
        if self.ledger.lapse(now):
            self._changed()
        due = [promise.until for promise in self.ledger.promises() if promise.until is not None]
        if due:
            self._lapsing = asyncio.get_running_loop().call_later(max(0.0, min(due) - now), self._lapse)

    async def _assign(self, sender: DeviceId, assign: Assign) -> None:
        held = self._held.get(assign.deployment)
        if held is not None:
            if held.coordinator != sender:
                raise RefusedError("this deployment obeys another coordinator")
            if held.epoch >= assign.epoch:
                raise RefusedError(f"epoch {assign.epoch} of this deployment is over or loading already")
            await self._let_go(assign.deployment, held.epoch)
        promise = self.ledger.promise(assign.deployment, assign.epoch)
        if promise is not None and promise.coordinator == sender:
            check(assign, promise.nbytes, sender == self._me)
        promise = self.ledger.commit(assign.deployment, assign.epoch, sender, time.monotonic())
        held = self._held[assign.deployment] = _HeldDeployment(assign.epoch, sender)
        task = held.task = asyncio.create_task(
            self._take_over(assign, held, sender, promise.nbytes), name=f"load {assign.deployment[:8]}/{assign.epoch}"
        )
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.cancelled():
            raise UnavailableError(held.over)
        error = task.exception()
        if error is not None:
            await self._let_go(assign.deployment, assign.epoch)
            if isinstance(error, PeerLLMError):
                raise error
            log.error("loading %s failed", assign.model, exc_info=error)
            raise EngineError(f"loading failed: {error}") from error

    async def _take_over(self, assign: Assign, held: _HeldDeployment, sender: DeviceId, promised: int) -> None:
        held.total_bytes = max(1, sum(t.nbytes for work in assign.work for t in work.tensors))
        own = await self._fetch(assign, held, sender)
        check = asyncio.create_task(
            self._weights.verify(own.values(), lambda *_: None), name=f"check {assign.deployment[:8]}"
        )
        check.add_done_callback(_seen)
        try:
            await self._load(assign, held, promised, own)
            if not await check:  # what changed on the disk was removed
                await self._engine.ask(Unload(self._engine.next_request(), assign.deployment), UNLOAD_TIMEOUT_S)
                own = await self._fetch(assign, held, sender)
                if not await self._weights.verify(own.values(), lambda *_: None):
                    raise UnavailableError("its disk changes weights while they are used")
                await self._load(assign, held, promised, own)
        finally:
            check.cancel()
        held.loaded = True

    async def _load(self, assign: Assign, held: _HeldDeployment, promised: int, own: Mapping[str, TensorAt]) -> None:
        here: set[str] = set()  # tensors loaded for it
        taken = 0
        for work in assign.work:
            again = [tensor for tensor in work.tensors if tensor.name in here]  # which a later stage shares
            limit = promised - taken + weight_bytes(again, assign.dtype, assign.quantize)
            spec = self._spec(assign, work, own, limit)
            held.load = asyncio.create_task(
                self._engine.ask(spec, LOAD_TIMEOUT_S), name=f"engine load {assign.deployment[:8]}/{work.stage}"
            )
            held.load.add_done_callback(_seen)
            await asyncio.shield(held.load)
            taken = await self._check_taken(assign.deployment)
            here |= {tensor.name for tensor in work.tensors}

    async def _check_taken(self, deployment: DeploymentId) -> int:
        """What the engine holds for it; RefusedError if it holds more than is promised to everybody."""
        load = await self._engine.ask(QueryLoad(self._engine.next_request()), QUERY_TIMEOUT_S)
        if not isinstance(load, EngineLoad):
            return 0
        taken = load.weight_bytes + load.kv_bytes
        if taken > self.ledger.promised_bytes:
            promised = human_bytes(self.ledger.promised_bytes)
            raise RefusedError(f"the shards take {human_bytes(taken)}, {promised} are promised")
        return load.held_bytes.get(deployment, 0)

    async def _fetch(self, assign: Assign, held: _HeldDeployment, source: DeviceId) -> dict[str, TensorAt]:
        def progress(_: str, done: int, total: int) -> None:
            held.total_bytes = max(1, total)
            self._tell(assign.deployment, held, "fetch", done)

        total = held.total_bytes
        own = await self._weights.fetch(assign, source, progress)
        held.total_bytes = total
        return own

    def _spec(self, assign: Assign, work: StageWork, own: Mapping[str, TensorAt], limit: int) -> LoadStage:
        hop = None
        if work.downstream is not None and work.downstream != self._me:
            hosts, port = self._address(work.downstream)
            hosts = tuple(dict.fromkeys((*hosts, *work.downstream_hosts)))[:MAX_HOSTS]
            port = port or work.downstream_port
            if not hosts or not port:
                raise UnavailableError("it does not know how to reach the next device of the plan")
            hop = Hop(work.downstream, hosts, port, work.downstream_stage)
        return LoadStage(
            request=self._engine.next_request(),
            deployment=assign.deployment,
            epoch=assign.epoch,
            stage=work.stage,
            stages=assign.stages,
            first_layer=work.first_layer,
            last_layer=work.last_layer,
            config=assign.config,
            tensors=tuple(own[tensor.name] for tensor in work.tensors),
            dtype=assign.dtype,
            slots=assign.slots,
            context=assign.context,
            chunk=assign.chunk,
            micro_batch=assign.micro_batch,
            micro_batches=assign.micro_batches,
            schedule=assign.schedule,
            upstream=work.upstream,
            downstream=hop,
            head_device=assign.head_device,
            limit_bytes=limit,
            quantize=assign.quantize,
            cuts=assign.cuts,
            upstream_activations=work.upstream_activations,
            downstream_activations=work.downstream_activations,
        )

    async def _activate(self, sender: DeviceId, asked: Activate) -> None:
        held = self._held.get(asked.deployment)
        if held is None or held.coordinator != sender or held.epoch != asked.epoch or not held.loaded:
            raise RefusedError("nothing is loaded here for this epoch")
        await self._engine.ask(Connect(self._engine.next_request(), asked.deployment, asked.epoch), CONNECT_TIMEOUT_S)

    async def _release(self, sender: DeviceId, asked: Release) -> None:
        held = self._held.get(asked.deployment)
        owners = {p.coordinator for p in self.ledger.promises() if p.deployment == asked.deployment}
        if held is not None:
            owners.add(held.coordinator)
        if owners - {sender}:
            raise RefusedError("this deployment obeys another coordinator")
        await self._let_go(asked.deployment, asked.epoch)
        self.ledger.release(asked.deployment, asked.epoch, sender)
        self._changed()

    # ---- letting go -----------------------------------------------------------------------------------------------

    async def _let_go(self, deployment: DeploymentId, epoch: int) -> None:
        """Stop loading, unload, then take the promise back: memory is never promised while it is still taken."""
        held = self._held.get(deployment)
        if held is None or held.epoch > epoch:
            return
        async with held.lock:
            if self._held.get(deployment) is not held:
                return
            if held.task is not None and held.task is not asyncio.current_task():
                held.task.cancel()
                await asyncio.wait({held.task})
            if held.load is not None:
                try:
                    await self._engine.ask(Unload(self._engine.next_request(), deployment), UNLOAD_TIMEOUT_S)
                    await asyncio.wait({held.load}, timeout=UNLOAD_TIMEOUT_S)
                except (EngineError, LinkError, TimeoutError) as error:
                    log.warning("unloading %s: %s", deployment[:8], error)  # a dead engine holds nothing
                held.load.cancel()
            self._drop(deployment, held)

    def _drop(self, deployment: DeploymentId, held: _HeldDeployment) -> None:
        self._held.pop(deployment, None)
        self._weights.forget(deployment)
        self.ledger.release(deployment, held.epoch, held.coordinator)
        self._changed()

    def _tell(
        self, deployment: DeploymentId, held: _HeldDeployment, phase: Literal["fetch", "load"], done: int
    ) -> None:
        now = time.monotonic()
        if now - held.told >= PROGRESS_S or done >= held.total_bytes:
            held.told = now
            self._report(held.coordinator, Progress(deployment, held.epoch, phase, done, held.total_bytes))


def _seen(task: asyncio.Task[Any]) -> None:
    """Take note of a load's error that nobody waits for any more: the deployment was released while it was loading."""
    if not task.cancelled():
        task.exception()
