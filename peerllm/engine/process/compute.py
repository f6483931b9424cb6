"""The compute thread: the one thread that owns the shards and the slots. It takes its work from one inbox."""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from peerllm.engine.base import Backend, Shard
from peerllm.engine.free_memory import return_memory
from peerllm.engine.messages import (
    Cancel,
    Done,
    EngineLoad,
    Failed,
    FromEngine,
    LoadStage,
    QueryLoad,
    Submit,
    Tokens,
    Unload,
)
from peerllm.engine.process.inbox import Inbox
from peerllm.engine.process.recorder import Recorder
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.loaded_stage import LoadedStage, steps_only
from peerllm.engine.schedule.local_deployment import LocalDeployment, StageKey
from peerllm.engine.wire.parcels import Parcel, TokenBatch
from peerllm.errors import PeerLLMError, one_line
from peerllm.transport.links.channels import Delivery
from peerllm.transport.links.link import Link
from peerllm.types import DeploymentId, DeviceId

_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|failed to allocate memory|bad_alloc", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A stage's shard was loaded."""

    spec: LoadStage
    shard: Shard


@dataclass(frozen=True, slots=True, eq=False)
class Linked:
    """The links of a deployment stand: `outlets` by the stage that sends."""

    request: int
    deployment: DeploymentId
    epoch: int
    outlets: Mapping[int, Link]


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


@dataclass(frozen=True, slots=True, eq=False)
class Echoed:
    """A frame by which another device times its link, handed over to this thread; nothing is computed for it."""


Event = Loaded | Linked | Arrived | Lost | Echoed | Unload | Submit | Cancel | QueryLoad


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
    """`run` is the body of the compute thread. Other threads may only call `inbox.put` and read `batches`."""

    def __init__(self, backend: Backend, tell: Callable[[FromEngine], None], recorder: Recorder) -> None:
        self.inbox: Inbox[Event] = Inbox()
        self._backend, self._tell, self._recorder = backend, tell, recorder
        self._schedule: Scheduler[StageKey] = Scheduler()
        self._deployments: dict[DeploymentId, LocalDeployment] = {}
        self.batches = 0  # computed so far

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

    def _compute(self, key: StageKey, batch: TokenBatch, started: float) -> None:
        """Compute a batch and hand its result on; whatever is raised there ends these sequences, not the engine."""
        identity, index = key
        deployment = self._deployments[identity]
        stage = deployment.stages[index]
        self.batches += 1
        try:
            try:
                result = stage.compute(batch)
            finally:
                if self._recorder.on:
                    self._recorder.lap("pass", identity, index, batch.runs, prompt=not steps_only(batch.runs))
            deployment.computed(index, *result)
        except self._backend.broken:
            raise
        except Exception as error:
            traceback.print_exc()
            for run in batch.runs:
                deployment.fail(index, run, reason_of(error))
        else:
            if self._recorder.on:
                self._recorder.lap("hand on", identity)
            stage.paced(batch.runs, time.perf_counter() - started)

    def _handle(self, event: Event) -> None:
        match event:
            case Arrived(delivery, parcels):
                delivery.taken()
                frame = delivery.frame
                deployment = self._deployments.get(frame.deployment)
                if deployment is not None and deployment.epoch == frame.epoch:  # else unloaded while it waited
                    deployment.arrived(frame.stage, parcels)
            case Submit(identity, sequence):
                deployment = self._deployments.get(identity)
                if deployment is None:
                    self._tell(Tokens(identity, sequence, 0, (), "error", "this deployment is not loaded here"))
                else:
                    deployment.submit(event)
            case Cancel(identity, sequence):
                if identity in self._deployments:
                    self._deployments[identity].cancel(sequence)
            case Loaded(spec, shard):
                self._loaded(spec, shard)
            case Linked(request, identity, epoch, outlets):
                deployment = self._deployments.get(identity)
                if deployment is not None and deployment.epoch == epoch:
                    deployment.linked(outlets)
                    self._tell(Done(request))
                else:
                    self._tell(Failed(request, "RefusedError", f"epoch {epoch} is not loaded here any more"))
            case Echoed():
                pass
            case Lost(identity, epoch, device, ingress, reason):
                deployment = self._deployments.get(identity)
                if deployment is not None and deployment.epoch == epoch:
                    deployment.lost(device, ingress, reason)
            case Unload(request, identity):
                self._unload(identity, "the deployment was stopped")
                self._tell(Done(request))
            case QueryLoad(request):
                self._tell(self._load(request))

    def _loaded(self, spec: LoadStage, shard: Shard) -> None:
        deployment = self._deployments.get(spec.deployment)
        if deployment is not None and deployment.epoch > spec.epoch:
            shard.close()
            self._tell(Failed(spec.request, "RefusedError", f"epoch {spec.epoch} is past"))
            return
        if deployment is not None and deployment.epoch < spec.epoch:
            self._unload(spec.deployment, "another plan took over")
            deployment = None
        if deployment is None:
            deployment = LocalDeployment(spec, self._schedule, self._tell)
            self._deployments[spec.deployment] = deployment
        if spec.stage in deployment.stages:
            shard.close()
            self._tell(Failed(spec.request, "RefusedError", f"stage {spec.stage} is loaded already; unload it first"))
            return
        deployment.loaded(LoadedStage(spec, shard, self._backend.sampler))
        self._tell(Done(spec.request))

    def _unload(self, identity: DeploymentId, reason: str) -> None:
        deployment = self._deployments.pop(identity, None)
        if deployment is not None:
            deployment.close(reason)
            del deployment
            return_memory()

    def _load(self, request: int) -> EngineLoad:
        stages = [(d.id, index, stage) for d in self._deployments.values() for index, stage in sorted(d.stages.items())]
        return EngineLoad(
            request,
            tuple((identity, index, len(stage.slots)) for identity, index, stage in stages),
            sum({key: nbytes for _, _, stage in stages for key, nbytes in stage.shard.weights.items()}.values()),
            sum(stage.shard.kv_bytes for _, _, stage in stages),
            psutil.Process().memory_info().rss,
            {f"{i}/{index}": stage.mean_step_ms for i, index, stage in stages if stage.mean_step_ms is not None},
            {f"{i}/{index}": stage.paces for i, index, stage in stages if stage.paces},
            {identity: deployment.held_bytes for identity, deployment in self._deployments.items()},
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
