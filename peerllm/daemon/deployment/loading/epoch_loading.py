"""An epoch's stages on this device: their weights fetched, then loaded by the engine within what is promised."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

from peerllm.daemon.control_messages import Assign, Progress, StageWork
from peerllm.daemon.decide.assignments import Address, weight_bytes
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.deployment.loading.held_deployment import HeldDeployment, HeldEpoch
from peerllm.engine.messages import EngineLoad, Hop, LoadStage, QueryLoad, TensorAt, Unload
from peerllm.errors import ModelError, RefusedError, UnavailableError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import DeploymentId, DeviceId

LOAD_TIMEOUT_S = 3600.0  # one stage from disk
QUERY_TIMEOUT_S = 10.0
UNLOAD_TIMEOUT_S = 30.0
MAX_HOSTS = 16  # addresses tried for the next device
PROGRESS_S = 0.1  # between two Progress of one epoch


class LoadingEngine(Protocol):
    """What the worker needs of the engine's host."""

    def next_request(self) -> int: ...

    async def ask(self, message: object, timeout_s: float) -> object: ...


class Fetcher(Protocol):
    """What the worker needs of weights (StageWeights)."""

    async def fetch(
        self, assign: Assign, coordinator: DeviceId, told: Callable[[Literal["fetch", "check"], int, int], None]
    ) -> dict[str, TensorAt]: ...

    async def verify(
        self, tensors: Iterable[TensorAt], told: Callable[[Literal["fetch", "check"], int, int], None]
    ) -> bool: ...

    def forget(self, deployment: DeploymentId) -> None: ...


class EpochLoading:
    """Loads what is assigned to this device; `tell` hears how far it is."""

    def __init__(
        self,
        me: DeviceId,
        ledger: Ledger,
        engine: LoadingEngine,
        weights: Fetcher,
        address: Callable[[DeviceId], Address],
        tell: Callable[[DeviceId, Progress], None],
    ) -> None:
        self._me, self._ledger, self._engine, self._weights = me, ledger, engine, weights
        self._address, self._tell = address, tell

    async def load(self, held: HeldDeployment, epoch: HeldEpoch) -> None:
        """Returns when every stage of the epoch here is loaded; raises why one is not."""
        epoch.total_bytes = max(1, sum(t.nbytes for work in epoch.assign.work for t in work.tensors))
        own = await self._fetch(held, epoch)
        name = f"check {held.deployment[:8]}"
        check = asyncio.create_task(self._weights.verify(own.values(), lambda *_: None), name=name)
        check.add_done_callback(_seen)
        try:
            try:
                await self._load_stages(held, epoch, own)
            except ModelError:  # a file may have been removed while the engine read it
                if await check:
                    raise
            if not await check:  # what changed on the disk was removed
                await self._engine.ask(
                    Unload(self._engine.next_request(), held.deployment, epoch.number, only=len(held.epochs) > 1),
                    UNLOAD_TIMEOUT_S,
                )
                held.shards.end(epoch.number, epoch.number)
                own = await self._fetch(held, epoch)
                if not await self._weights.verify(own.values(), lambda *_: None):
                    raise UnavailableError("its disk changes weights while they are used")
                await self._load_stages(held, epoch, own)
        finally:
            check.cancel()
        epoch.loaded = True

    async def _load_stages(self, held: HeldDeployment, epoch: HeldEpoch, own: Mapping[str, TensorAt]) -> None:
        assign = epoch.assign
        here: set[str] = set()  # tensors loaded for it
        promise = self._ledger.promise(assign.deployment, assign.epoch)
        room = promise.nbytes if promise is not None else 0  # for all of the epoch, what it takes over counted too
        added = 0  # bytes that the engine holds for this epoch and did not before
        for work in assign.work:
            again = [tensor for tensor in work.tensors if tensor.name in here]  # which a later stage shares
            shared = weight_bytes(again, assign.dtype, assign.quantize)
            async with held.loading:
                before = await self._taken(assign.deployment)
                beside = self._ledger.promised_to(assign.deployment) - before  # the epochs that stand here counted
                spec = self._spec(assign, work, own, room - added + shared, beside + shared)
                epoch.load = asyncio.create_task(
                    self._engine.ask(spec, LOAD_TIMEOUT_S), name=f"engine load {assign.deployment[:8]}/{work.stage}"
                )
                epoch.load.add_done_callback(_seen)
                await asyncio.shield(epoch.load)
                held.shards.load(assign.epoch, (work.first_layer, work.last_layer), (assign.slots, assign.context))
                added += await self._taken(assign.deployment) - before
            here |= {tensor.name for tensor in work.tensors}

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

    async def _fetch(self, held: HeldDeployment, epoch: HeldEpoch) -> dict[str, TensorAt]:
        def progress(_: str, done: int, total: int) -> None:
            epoch.total_bytes = max(1, total)
            self._report(held, epoch, "fetch", done)

        total = epoch.total_bytes
        own = await self._weights.fetch(epoch.assign, held.coordinator, progress)
        epoch.total_bytes = total
        return own

    def _spec(self, assign: Assign, work: StageWork, own: Mapping[str, TensorAt], limit: int, added: int) -> LoadStage:
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
            added_limit_bytes=added,
            quantize=assign.quantize,
            cuts=assign.cuts,
            upstream_activations=work.upstream_activations,
            downstream_activations=work.downstream_activations,
            state_from=work.state_from,
        )

    def _report(self, held: HeldDeployment, epoch: HeldEpoch, phase: Literal["fetch", "load"], done: int) -> None:
        now = time.monotonic()
        if now - epoch.told >= PROGRESS_S or done >= epoch.total_bytes:
            epoch.told = now
            self._tell(held.coordinator, Progress(held.deployment, epoch.number, phase, done, epoch.total_bytes))


def _seen(task: asyncio.Task[Any]) -> None:
    """Take note of a load's error that nobody waits for any more: the deployment was released while it was loading."""
    if not task.cancelled():
        task.exception()
