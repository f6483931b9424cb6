"""All that one device holds of deployments, and how it lets go of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator

from peerllm.daemon.control_messages import Holding
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.deployment.loading.epoch_loading import UNLOAD_TIMEOUT_S, Fetcher, LoadingEngine
from peerllm.daemon.deployment.loading.held_deployment import HeldDeployment, HeldEpoch
from peerllm.engine.messages import Unload
from peerllm.errors import EngineError, LinkError
from peerllm.types import DeploymentId, DeviceId

log = logging.getLogger(__name__)


class DeviceHoldings:
    """`changed` is called when promises are taken back."""

    def __init__(self, ledger: Ledger, engine: LoadingEngine, weights: Fetcher, changed: Callable[[], None]) -> None:
        self._ledger, self._engine, self._weights, self._changed = ledger, engine, weights, changed
        self._held: dict[DeploymentId, HeldDeployment] = {}

    def all(self) -> list[HeldDeployment]:
        return list(self._held.values())

    def find(self, deployment: DeploymentId) -> HeldDeployment | None:
        return self._held.get(deployment)

    def of(self, deployment: DeploymentId, coordinator: DeviceId) -> HeldDeployment | None:
        """What is held of a deployment, if that device coordinates it."""
        held = self._held.get(deployment)
        return held if held is not None and held.coordinator == coordinator else None

    def epochs_of(self, coordinator: DeviceId) -> Iterator[HeldEpoch]:
        """All epochs that obey a coordinator."""
        return (one for held in self._held.values() if held.coordinator == coordinator for one in held.epochs.values())

    def begin(self, deployment: DeploymentId, coordinator: DeviceId) -> HeldDeployment:
        """The deployment's place here, a new one if it has none."""
        return self._held.setdefault(deployment, HeldDeployment(deployment, coordinator))

    def holdings(self) -> tuple[Holding, ...]:
        """All that is loaded here, for everyone to see."""
        return tuple(one for deployment in sorted(self._held) for one in self._held[deployment].holdings())

    def coordinators(self) -> set[DeviceId]:
        """Who holds something here, or is promised it."""
        holders = {held.coordinator for held in self._held.values()}
        return holders | {promise.coordinator for promise in self._ledger.promises()}

    async def let_go(self, held: HeldDeployment, numbers: Iterable[int] | None = None) -> None:
        """Stop loading, unload, then take the promises back: memory is never promised while it is still taken.

        `numbers`: of these epochs; None: of all.
        """
        async with held.lock:
            wanted = sorted(held.epochs if numbers is None else numbers)
            epochs = [held.epochs[number] for number in wanted if number in held.epochs]
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
                self.drop(held, epoch)

    async def let_go_for(self, coordinator: DeviceId) -> None:
        """Let go of all that a coordinator holds here or is promised."""
        for held in self.all():
            if held.coordinator == coordinator:
                await self.let_go(held)
        for promise in self._ledger.promises():
            if promise.coordinator == coordinator and promise.deployment not in self._held:
                self._ledger.release(promise.deployment, promise.epoch, coordinator)
        self._changed()

    def drop(self, held: HeldDeployment, epoch: HeldEpoch) -> None:
        """An epoch of which the engine has nothing."""
        if held.epochs.get(epoch.number) is not epoch:  # let go of already
            return
        held.ended(epoch.number)
        if not held.epochs and self._held.get(held.deployment) is held:
            del self._held[held.deployment]
            self._weights.forget(held.deployment)
        self._ledger.release(held.deployment, epoch.number, held.coordinator, only=True)
        self._changed()

    def _unload(self, held: HeldDeployment, epochs: list[HeldEpoch]) -> Unload:
        """For these epochs, which are the only ones, the earliest, or one alone."""
        request, rest = self._engine.next_request(), held.epochs.keys() - {one.number for one in epochs}
        if not rest:
            return Unload(request, held.deployment)
        last = epochs[-1].number
        return Unload(request, held.deployment, last, only=min(rest) < last)
