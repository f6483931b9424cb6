"""The compute thread: the one thread that owns the shards and the slots. It takes its work from one inbox."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from peerllm.engine.base import Backend
from peerllm.engine.free_memory import return_memory
from peerllm.engine.masks.mask_maker import MadeMask, MaskMaker
from peerllm.engine.messages import (
    WORKING_STEPS,
    Cancel,
    Done,
    EngineLoad,
    Failed,
    FromEngine,
    LoadStage,
    QueryLoad,
    Submit,
    Switch,
    Tokens,
    Unload,
    Working,
)
from peerllm.engine.process.inbox import Inbox
from peerllm.engine.process.recorder import Recorder
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.epoch_ring import RingCounts, StageKey
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage, steps_only
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.schedule.state_export import StateExport
from peerllm.engine.wire.parcels import Parcel, TokenBatch
from peerllm.engine.wire.state_frames import CarriedPart
from peerllm.errors import OverloadedError, PeerLLMError, RefusedError, one_line
from peerllm.transport.links.channels import Delivery
from peerllm.transport.links.link import Link
from peerllm.types import DeploymentId, DeviceId

_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|failed to allocate memory|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """What was missing of a stage was loaded: `fresh` of its shards; the others were there already."""

    spec: LoadStage
    chain: tuple[HeldShard, ...]
    fresh: tuple[HeldShard, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Linked:
    """The links of a deployment stand: `outlets` by the stage that sends."""

    request: int
    deployment: DeploymentId
    epoch: int
    outlets: Mapping[int, Link]


@dataclass(frozen=True, slots=True, eq=False)
class HeadLinked:
    """The head of an epoch whose source is here has dialled: `link` goes both ways."""

    link: Link


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """A checked frame came in, which carries `parcels`."""

    delivery: Delivery
    parcels: Sequence[Parcel]


@dataclass(frozen=True, slots=True)
class Lost:
    """The link to or from `device` is gone: `ingress` is the stage it fed; None: it was one we sent on."""

    deployment: DeploymentId
    epoch: int
    device: DeviceId
    ingress: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Hurry:
    """Some time has passed since Switch, which is not answered yet."""

    deployment: DeploymentId


@dataclass(frozen=True, slots=True, eq=False)
class Echoed:
    """A frame by which another device times its link, handed over to this thread; nothing is computed for it."""


@dataclass(frozen=True, slots=True, eq=False)
class StateCame:
    """A checked frame came in that carries a part of a sequence's state."""

    delivery: Delivery
    carried: CarriedPart


@dataclass(frozen=True, slots=True, eq=False)
class CarryTurn:
    """Some of a CarryState's work is to be done; `reply` gets what to send (nothing: all is done), or what failed."""

    export: StateExport
    reply: Callable[[list[CarriedPart], Exception | None], None]


Event = (
    Loaded | Linked | HeadLinked | MadeMask
    | Arrived | Lost | Echoed | Hurry | StateCame | CarryTurn | Switch | Unload | Submit | Cancel
    | QueryLoad
)  # fmt: skip


def reason_of(error: BaseException) -> str:
    """An error of any kind as one clear line."""
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        return "out of memory; give the deployment fewer slots, less context or more devices"
    text = one_line(error)
    return text if isinstance(error, PeerLLMError) else f"{type(error).__name__}: {text}"


def failed(request: int, error: BaseException) -> Failed:
    """The answer to a request that went wrong."""
    return Failed(request, type(error).__name__ if isinstance(error, PeerLLMError) else "EngineError", reason_of(error))


class Compute:
    """`run` is the body of the compute thread. Others may only call `inbox.put` and `shards`, and read `batches`."""

    def __init__(self, backend: Backend, tell: Callable[[FromEngine], None], recorder: Recorder) -> None:
        self.inbox: Inbox[Event] = Inbox()
        self._backend, self._tell, self._recorder = backend, tell, recorder
        self._schedule: Scheduler[StageKey] = Scheduler()
        self._deployments: dict[DeploymentId, LocalDeployment] = {}
        self._shards: dict[DeploymentId, tuple[HeldShard, ...]] = {}  # for other threads to read
        self._counts = RingCounts()
        self._masks = MaskMaker(self._mask_made)
        self.batches = 0  # computed so far
        self._steps = 0  # batches of steps that went well

    def shards(self, deployment: DeploymentId) -> tuple[HeldShard, ...]:
        """What is loaded of a deployment."""
        return self._shards.get(deployment, ())

    def run(self) -> None:
        """Until the inbox is closed."""
        batch, spent = None, 0.0
        while (events := self.inbox.take(wait=batch is None)) is not None:
            started = time.perf_counter() - spent
            if batch is None and self._recorder.on:
                self._recorder.lap("idle")
            for event in events:
                self._handle(event)
            batch = self._schedule.next()
            if self._recorder.on:
                self._recorder.lap("take in")
            if batch is not None:
                self._compute(*batch, started)
            # Handling events that brought no batch counts towards the next pass.
            spent = time.perf_counter() - started if batch is None else 0.0
        for deployment in self._deployments.values():
            deployment.close("the engine is stopping")
        self._deployments.clear()
        self._masks.close()

    def _mask_made(self, made: MadeMask) -> None:
        """In the mask maker's threads; each running sequence has one on the way at most."""
        with contextlib.suppress(OverloadedError):  # the engine is stopping
            self.inbox.put(made, always=True)

    def _compute(self, key: StageKey, batch: TokenBatch, started: float) -> None:
        """Compute a batch and hand its result on; whatever is raised there ends these sequences, not the engine."""
        identity, epoch, index = key
        ring = self._deployments[identity].rings[epoch]
        stage = ring.stages[index]
        self.batches += 1
        try:
            try:
                result = stage.compute(batch)
            finally:
                if self._recorder.on:
                    self._recorder.lap("pass", identity, index, batch.runs, prompt=not steps_only(batch.runs))
            ring.computed(index, *result)
        except self._backend.broken:
            raise
        except Exception as error:
            traceback.print_exc()
            for run in batch.runs:
                ring.fail(index, run, reason_of(error))
        else:
            if self._recorder.on:
                self._recorder.lap("hand on", identity)
            stage.paced(batch.runs, time.perf_counter() - started)
            if steps_only(batch.runs):
                self._steps += 1
                if self._steps == WORKING_STEPS:
                    self._tell(Working())

    def _handle(self, event: Event) -> None:
        match event:
            case Arrived(delivery, parcels):
                delivery.taken()
                frame = delivery.frame
                if (deployment := self._deployments.get(frame.deployment)) is not None:  # else unloaded while it waited
                    deployment.arrived(frame.epoch, frame.stage, parcels)
            case StateCame(delivery, carried):
                delivery.taken()
                frame = delivery.frame
                if (deployment := self._deployments.get(frame.deployment)) is not None:
                    deployment.state_came(frame.epoch, frame.stage, carried)
            case CarryTurn(export, reply):
                try:
                    parts = export.turn(self._deployment(export.message.deployment))
                except Exception as error:  # of one CarryState, which fails
                    reply([], error)
                else:
                    reply(parts, None)
            case MadeMask(identity):
                if (deployment := self._deployments.get(identity)) is not None:
                    deployment.mask_made(event)
            case HeadLinked(link):
                if (deployment := self._deployments.get(link.deployment)) is not None:
                    deployment.head_linked(link.epoch, link)
            case Submit(identity, sequence):
                try:
                    self._deployment(identity).submit(event)
                except PeerLLMError as error:
                    self._tell(Tokens(identity, sequence, len(event.answer), (), "error", str(error)))
            case Cancel(identity, sequence):
                if identity in self._deployments:
                    self._deployments[identity].cancel(sequence)
            case Switch(request, identity):
                try:
                    self._deployment(identity).switch(event)
                except PeerLLMError as error:
                    self._tell(failed(request, error))
            case Hurry(identity):
                if identity in self._deployments:
                    self._deployments[identity].hurry()
            case Loaded():
                self._loaded(event)
            case Linked(request, identity, epoch, outlets):
                deployment = self._deployments.get(identity)
                if deployment is not None and epoch in deployment.rings:
                    deployment.linked(epoch, outlets)
                    self._tell(Done(request))
                else:
                    self._tell(Failed(request, "RefusedError", f"epoch {epoch} is not loaded here any more"))
            case Echoed():
                pass
            case Lost(identity, epoch, device, ingress, reason):
                deployment = self._deployments.get(identity)
                if deployment is not None and epoch in deployment.rings:
                    deployment.rings[epoch].lost(device, ingress, reason)
            case Unload(request, identity, epoch, only):
                self._unload(identity, epoch, only, "the deployment was stopped")
                self._tell(Done(request))
            case QueryLoad(request):
                self._tell(self._load(request))

    def _deployment(self, identity: DeploymentId) -> LocalDeployment:
        deployment = self._deployments.get(identity)
        if deployment is None:
            raise RefusedError("this deployment is not loaded here")
        return deployment

    def _loaded(self, event: Loaded) -> None:
        spec, identity = event.spec, event.spec.deployment
        deployment = self._deployments.get(identity)
        there = {*event.fresh, *(() if deployment is None else deployment.shards)}
        try:
            if not there.issuperset(event.chain):
                raise RefusedError("layers that were loaded already were unloaded meanwhile; ask again")
            if deployment is None:
                deployment = LocalDeployment(identity, self._schedule, self._tell, self._counts, self._masks)
            deployment.loaded(LoadedStage(spec, event.chain, self._backend.sampler))
        except PeerLLMError as error:
            for one in event.fresh:
                one.shard.close()
            self._tell(failed(spec.request, error))
            return
        self._deployments[identity] = deployment
        self._shards[identity] = deployment.shards
        self._counts.loaded_layers += sum(one.last_layer - one.first_layer + 1 for one in event.fresh)
        self._tell(Done(spec.request))

    def _unload(self, identity: DeploymentId, epoch: int | None, only: bool, reason: str) -> None:
        deployment = self._deployments.get(identity)
        if deployment is None:
            return
        if epoch is not None and any(one != epoch if only else one > epoch for one in deployment.rings):
            deployment.unload(epoch, only)
            self._shards[identity] = deployment.shards
        else:
            del self._deployments[identity]
            self._shards.pop(identity, None)
            deployment.close(reason)
        del deployment
        return_memory()

    def _load(self, request: int) -> EngineLoad:
        rings = [(d.id, ring) for d in self._deployments.values() for _, ring in sorted(d.rings.items())]
        stages = [(identity, index, one) for identity, ring in rings for index, one in sorted(ring.stages.items())]
        shards = [one.shard for deployment in self._deployments.values() for one in deployment.shards]
        return EngineLoad(
            request,
            tuple((identity, index, stage.in_use) for identity, index, stage in stages),
            sum({key: nbytes for shard in shards for key, nbytes in shard.weights.items()}.values()),
            sum(shard.kv_bytes for shard in shards),
            psutil.Process().memory_info().rss,
            {f"{i}/{index}": stage.mean_step_ms for i, index, stage in stages if stage.mean_step_ms is not None},
            {f"{i}/{index}": stage.paces for i, index, stage in stages if stage.paces},
            {identity: deployment.held_bytes for identity, deployment in self._deployments.items()},
            self._counts.replayed_tokens,
            self._counts.dropped_frames,
            self._counts.loaded_layers,
        )


def start(compute: Compute, ended: Callable[[BaseException | None], None]) -> threading.Thread:
    """Start the compute thread. It calls `ended` at its end, with the error that ended it, if any."""

    def body() -> None:
        try:
            compute.run()
        except BaseException as error:
            ended(error)
        else:
            ended(None)

    thread = threading.Thread(target=body, name="engine-compute", daemon=True)
    thread.start()
    return thread
