"""A follower fetches what only a deployment's source has, so that it could be the source itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from peerllm.daemon.control_messages import Answer, HubFiles, Inherit, TensorDigest
from peerllm.daemon.successor.inheritance import InheritedModel, InheritedModels, check_files
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import TensorAt
from peerllm.errors import PeerLLMError, UnavailableError
from peerllm.types import DeploymentId, DeviceId

INHERIT_TIMEOUT_S = 300.0  # the source may have to hash all of its tensors
RETRY_S = 15.0  # after a failure
MAX_TRIES = 2  # to have on this disk what is fetched

Need = tuple[DeviceId, frozenset[int]]  # the coordinator, and layers that other devices hold

log = logging.getLogger(__name__)


class Equipment:
    """`equipped` is called with a deployment whose every tensor is on this disk, or on another follower's."""

    def __init__(
        self,
        store: WeightStore,
        models: InheritedModels,
        ask: Callable[[DeviceId, Inherit, float], Awaitable[Answer]],
        equipped: Callable[[DeploymentId], None],
    ) -> None:
        self._store, self._models, self._ask, self._equipped = store, models, ask, equipped
        self._needs: dict[DeploymentId, Need] = {}
        self._tasks: dict[DeploymentId, asyncio.Task[None]] = {}
        self._here: dict[DeploymentId, InheritedModel] = {}

    def get(self, deployment: DeploymentId) -> InheritedModel | None:
        """The deployment's model, once it is complete here."""
        return self._here.get(deployment)

    def follow(self, deployment: DeploymentId, need: Need) -> None:
        """Have what the coordinator alone holds; what was fetched for an earlier plan stays."""
        if self._needs.get(deployment) == need:
            return
        self._needs[deployment] = need
        if (task := self._tasks.get(deployment)) is not None:
            task.cancel()
        self._tasks[deployment] = asyncio.create_task(self._equip(deployment, *need), name=f"equip {deployment[:8]}")

    def pause(self, deployment: DeploymentId) -> None:
        """Fetch nothing for now, as nobody is there to fetch it from."""
        self._needs.pop(deployment, None)
        if (task := self._tasks.pop(deployment, None)) is not None:
            task.cancel()

    def forget(self, deployment: DeploymentId) -> None:
        """The deployment is over."""
        self.pause(deployment)
        self._here.pop(deployment, None)
        self._store.forget(_of(deployment))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _equip(self, deployment: DeploymentId, coordinator: DeviceId, elsewhere: frozenset[int]) -> None:
        while True:
            try:
                await self._fetch(deployment, coordinator, elsewhere)
                return
            except (PeerLLMError, OSError) as error:
                log.info("this device cannot follow in %s yet: %s", deployment[:8], error)
            await asyncio.sleep(RETRY_S)

    async def _fetch(self, deployment: DeploymentId, coordinator: DeviceId, elsewhere: frozenset[int]) -> None:
        answer = await self._ask(coordinator, Inherit(deployment), INHERIT_TIMEOUT_S)
        files = check_files(answer.inherited)
        found = await self._have(deployment, coordinator, files)
        paths = {name: Path(at.path) for name, at in found.items()}
        model = await asyncio.to_thread(self._models.adopt, deployment, paths, frozenset(self._here))
        inheritance = model.inheritance
        # With the files, so that none of both is removed for the other.
        wanted = [*files, *inheritance.digests(without=elsewhere)]
        await self._have(deployment, coordinator, wanted, inheritance.hub)
        self._here[deployment] = model
        await self._ask(coordinator, Inherit(deployment, complete=True), INHERIT_TIMEOUT_S)
        self._equipped(deployment)

    async def _have(
        self, deployment: DeploymentId, coordinator: DeviceId, tensors: list[TensorDigest], hub: HubFiles | None = None
    ) -> dict[str, TensorAt]:
        """All of them on this disk. What changed there is fetched again now: later nobody else might have it."""
        for _ in range(MAX_TRIES):
            found = await self._store.fetch(_of(deployment), coordinator, tensors, lambda *_: None, hub)
            if not await self._store.verify(found.values(), lambda *_: None):
                return found
        raise UnavailableError("its disk changes what it keeps")


def _of(deployment: DeploymentId) -> str:
    """Under what the store knows it, beside the stages of the same deployment."""
    return f"{deployment} inherited"
