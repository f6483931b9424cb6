"""The weights of a device's stages: where they lie, fetched where they are not here, and whether they are good."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from peerllm.daemon.control_messages import Assign, TensorDigest
from peerllm.daemon.weights.digests import Digests
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError
from peerllm.types import DeploymentId, DeviceId

Phase = Literal["fetch", "check"]
Told = Callable[[Phase, int, int], None]  # what is done, bytes done, bytes in all


def tensors_of(assign: Assign) -> list[TensorDigest]:
    """All tensors of an assignment, once each."""
    return list({tensor.name: tensor for work in assign.work for tensor in work.tensors}.values())


class StageWeights:
    """`own_tensors` tells where the tensors of this device's own deployments lie, if in files of its own."""

    def __init__(
        self,
        me: DeviceId,
        store: WeightStore,
        digests: Digests,
        own_tensors: Callable[[DeploymentId], Mapping[str, TensorAt]],
        token: Callable[[], str | None],
    ) -> None:
        self._me, self._store, self._digests = me, store, digests
        self._own_tensors, self._token = own_tensors, token

    async def fetch(self, assign: Assign, coordinator: DeviceId, told: Told) -> dict[str, TensorAt]:
        """Where every tensor of the assignment lies on this disk, by name."""
        mine = coordinator == self._me
        own = self._own_tensors(assign.deployment) if mine else {}
        inherited = {name: Path(one.path).name for name, one in own.items() if self._store.keeps(one)}
        own = {name: one for name, one in own.items() if name not in inherited}
        found = {tensor.name: own[tensor.name] for tensor in tensors_of(assign) if tensor.name in own}
        missing = [
            replace(tensor, sha256=inherited.get(tensor.name, tensor.sha256))
            for tensor in tensors_of(assign)
            if tensor.name not in found
        ]
        if gone := [tensor.name for tensor in missing if not tensor.sha256 and tensor.file < 0]:
            raise ModelError(f"tensor {gone[0]} is missing from the model's files")
        if missing:
            token = self._token() if mine else None  # a member must not get what only this device's owner may
            found |= await self._store.fetch(
                assign.deployment, coordinator, missing, lambda *bytes_: told("fetch", *bytes_), assign.hub, token
            )
        return found

    async def verify(self, tensors: Iterable[TensorAt], told: Told) -> bool:
        """Hash what this process has not hashed yet; False: some changed on the disk, and must be fetched again.

        ModelError if a file of the owner's own changed silently.
        """
        tensors = list(tensors)
        kept = {tensor.path for tensor in tensors if self._store.keeps(tensor)}
        damaged = await self._store.verify([t for t in tensors if t.path in kept], lambda *done: told("check", *done))
        own = [tensor for tensor in tensors if tensor.path not in kept]
        if own:
            await self._digests.verify(own, lambda *done: told("check", *done))
        return not damaged

    def forget(self, deployment: DeploymentId) -> None:
        self._store.forget(deployment)
