"""An epoch's stages on this device: their weights fetched, then loaded by the engine within what is promised."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from peerllm.daemon.control_messages import Assign, Progress, StageWork, TensorDigest
from peerllm.daemon.decide.assignments import Address, weight_bytes
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.deployment.held_deployment import HeldDeployment, HeldEpoch
from peerllm.engine.messages import EngineLoad, Hop, LoadStage, QueryLoad, TensorAt
from peerllm.errors import RefusedError, UnavailableError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import DeploymentId, DeviceId

LOAD_TIMEOUT_S = 3600.0  # one stage from disk
QUERY_TIMEOUT_S = 10.0
MAX_HOSTS = 16  # addresses tried for the next device
PROGRESS_S = 0.1  # between two Progress of one epoch


class LoadingEngine(Protocol):
    """What the worker needs of the engine's host."""

    def next_request(self) -> int: ...

    async def ask(self, message: object, timeout_s: float) -> object: ...


class Fetcher(Protocol):
    """What the worker needs of the store of weights."""

    async def fetch(
        self,
        deployment: DeploymentId,
        source: DeviceId,
        tensors: tuple[TensorDigest, ...],
        progress: Callable[[int, int], None],
    ) -> None: ...

    def path(self, sha256: str) -> object: ...

    def forget(self, deployment: DeploymentId) -> None: ...


class EpochLoading:
    """Loads what is assigned to this device; `tell` hears how far it is."""

    def __init__(
        self,
        me: DeviceId,
        ledger: Ledger,
        engine: LoadingEngine,
        store: Fetcher,
        own_tensors: Callable[[DeploymentId], Mapping[str, TensorAt]],
        address: Callable[[DeviceId], Address],
        tell: Callable[[DeviceId, Progress], None],
    ) -> None:
        self._me, self._ledger, self._engine, self._store = me, ledger, engine, store
        self._own_tensors, self._address, self._tell = own_tensors, address, tell

    async def load(self, held: HeldDeployment, epoch: HeldEpoch) -> None:
        """Returns when every stage of the epoch here is loaded; raises why one is not."""
        assign = epoch.assign
        wanted = tuple({t.name: t for work in assign.work for t in work.tensors}.values())
        epoch.total_bytes = max(1, sum(t.nbytes for work in assign.work for t in work.tensors))
        if held.coordinator == self._me:
            own = self._own_tensors(assign.deployment)
        else:
            await self._fetch(held, epoch, wanted)
            own = {tensor.name: self._kept(tensor) for tensor in wanted}
        here: set[str] = set()  # tensors loaded for it
        taken = await self._taken(assign.deployment)
        for work in assign.work:
            again = [tensor for tensor in work.tensors if tensor.name in here]  # which a later stage shares
            room = self._ledger.promised_to(assign.deployment) - taken
            limit = room + weight_bytes(again, assign.dtype, assign.quantize)
            spec = self._spec(assign, work, own, limit)
            epoch.load = asyncio.create_task(
                self._engine.ask(spec, LOAD_TIMEOUT_S), name=f"engine load {assign.deployment[:8]}/{work.stage}"
            )
            epoch.load.add_done_callback(_seen)
            await asyncio.shield(epoch.load)
            held.shards.load(assign.epoch, (work.first_layer, work.last_layer), (assign.slots, assign.context))
            taken = await self._taken(assign.deployment)
            here |= {tensor.name for tensor in work.tensors}
        epoch.loaded = True

    def progressed(self, held: HeldDeployment, stage: int, done_bytes: int) -> None:
        """The engine has read so much of a stage."""
        for epoch in held.epochs.values():
            if not epoch.loaded and any(work.stage == stage for work in epoch.assign.work):
                epoch.done[stage] = done_bytes
                self._report(held, epoch, "load", sum(epoch.done.values()))

    def hop(self, device: DeviceId, hosts: tuple[str, ...], port: int, stage: int) -> Hop:
        """The way to a stage's engine: as this device reaches it, or else where the coordinator does."""
        own, own_port = self._address(device)
        hosts, port = tuple(dict.fromkeys((*own, *hosts)))[:MAX_HOSTS], own_port or port
        if not hosts or not port:
            raise UnavailableError("it does not know how to reach the next device of the plan")
        return Hop(device, hosts, port, stage)

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _taken(self, deployment: DeploymentId) -> int:
        """What the engine holds for it; RefusedError if it holds more than is promised to everybody."""
        load = await self._engine.ask(QueryLoad(self._engine.next_request()), QUERY_TIMEOUT_S)
        if not isinstance(load, EngineLoad):
            return 0
        taken = load.weight_bytes + load.kv_bytes
        if taken > self._ledger.promised_bytes:
            promised = human_bytes(self._ledger.promised_bytes)
            raise RefusedError(f"the shards take {human_bytes(taken)}, {promised} are promised")
        return load.held_bytes.get(deployment, 0)

    async def _fetch(self, held: HeldDeployment, epoch: HeldEpoch, wanted: tuple[TensorDigest, ...]) -> None:
        def progress(done: int, total: int) -> None:
            epoch.total_bytes = max(1, total)
            self._report(held, epoch, "fetch", done)

        total = epoch.total_bytes
        await self._store.fetch(held.deployment, held.coordinator, wanted, progress)
        epoch.total_bytes = total

    def _kept(self, tensor: TensorDigest) -> TensorAt:
        path = str(self._store.path(tensor.sha256))
        return TensorAt(tensor.name, tensor.dtype, tensor.shape, path, 0, tensor.nbytes)

    def _spec(self, assign: Assign, work: StageWork, own: Mapping[str, TensorAt], limit: int) -> LoadStage:
        hop = None
        if work.downstream is not None and work.downstream != self._me:
            hop = self.hop(work.downstream, work.downstream_hosts, work.downstream_port, work.downstream_stage)
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

    def _report(self, held: HeldDeployment, epoch: HeldEpoch, phase: Literal["fetch", "load"], done: int) -> None:
        now = time.monotonic()
        if now - epoch.told >= PROGRESS_S or done >= epoch.total_bytes:
            epoch.told = now
            self._tell(held.coordinator, Progress(held.deployment, epoch.number, phase, done, epoch.total_bytes))


def _seen(task: asyncio.Task[object]) -> None:
    """Take note of a load's error that nobody waits for any more: the deployment was released while it was loading."""
    if not task.cancelled():
        task.exception()
