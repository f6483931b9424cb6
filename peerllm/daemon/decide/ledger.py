"""The memory that this device promised to deployments, never more in sum than its owner lends. Sans-I/O."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from peerllm.daemon.control_messages import Reserve
from peerllm.errors import RefusedError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import DeploymentId, DeviceId

MAX_PROMISES = 256  # deployments and epochs a device promises memory to at once
MAX_LEASE_S = 600.0  # an uncommitted promise lives no longer, whatever the coordinator asks
MAX_FENCES = 1024  # released deployments remembered, so that a late question cannot revive one


@dataclass(frozen=True, slots=True)
class Promise:
    """`until` is when an uncommitted one lapses; None once it is committed."""

    deployment: DeploymentId
    epoch: int
    coordinator: DeviceId
    nbytes: int
    until: float | None


class Ledger:
    """All promises of one device; `now` is any clock that only rises."""

    def __init__(self, lent_bytes: int) -> None:
        self.lent_bytes = lent_bytes
        self.leaving = ""  # why nothing is promised any more
        self.full = False  # the machine has no memory for more than is promised already
        self._promises: dict[tuple[DeploymentId, int], Promise] = {}
        self._fences: OrderedDict[tuple[DeploymentId, DeviceId], int] = OrderedDict()

    @property
    def promised_bytes(self) -> int:
        return sum(promise.nbytes for promise in self._promises.values())

    @property
    def free_bytes(self) -> int:
        return 0 if self.leaving or self.full else self.lent_bytes - self.promised_bytes

    @property
    def offered_bytes(self) -> int:
        """What the household is told that this device lends."""
        return min(self.lent_bytes, self.promised_bytes) if self.full else self.lent_bytes

    def promises(self) -> tuple[Promise, ...]:
        return tuple(self._promises.values())

    def promise(self, deployment: DeploymentId, epoch: int) -> Promise | None:
        return self._promises.get((deployment, epoch))

    def reserve(self, asked: Reserve, coordinator: DeviceId, now: float) -> None:
        """Promise memory for a bounded time; asking again with the same size renews it. RefusedError says why not."""
        self.lapse(now)
        if self.leaving:
            raise RefusedError(f"it takes part in nothing now: {self.leaving}")
        if asked.nbytes < 0 or not 0 < asked.lease_s <= MAX_LEASE_S:
            raise RefusedError(f"a reservation of {asked.nbytes} bytes for {asked.lease_s} s makes no sense")
        self._check_turn(asked.deployment, asked.epoch, coordinator)
        key = (asked.deployment, asked.epoch)
        held = self._promises.get(key)
        if held is not None and held.until is None:
            raise RefusedError("this epoch is already committed here; release it first")
        free = self.free_bytes + (held.nbytes if held is not None else 0)
        if asked.nbytes > free:
            lent = human_bytes(self.lent_bytes)
            raise RefusedError(f"{human_bytes(asked.nbytes)} are asked for, {human_bytes(free)} of {lent} are free")
        if held is None and len(self._promises) >= MAX_PROMISES:
            raise RefusedError(f"{MAX_PROMISES} promises are given already; stop a model first")
        self._promises[key] = Promise(asked.deployment, asked.epoch, coordinator, asked.nbytes, now + asked.lease_s)

    def commit(self, deployment: DeploymentId, epoch: int, coordinator: DeviceId, now: float) -> Promise:
        """Keep a promise until it is released; RefusedError if it lapsed or is another coordinator's."""
        self.lapse(now)
        held = self._promises.get((deployment, epoch))
        if held is None:
            raise RefusedError("there is no reservation for this epoch, or it lapsed; reserve again")
        if held.coordinator != coordinator:
            raise RefusedError("this deployment obeys another coordinator")
        if held.until is None:
            raise RefusedError("this epoch is already committed here; release it first")
        held = self._promises[deployment, epoch] = replace(held, until=None)
        return held

    def release(self, deployment: DeploymentId, epoch: int, coordinator: DeviceId) -> None:
        """Take back the promises to a coordinator's deployment up to `epoch`, and refuse it those epochs from now on.

        Nobody but the coordinator is refused anything: a device must not be able to shut out another's deployment.
        """
        for key, held in list(self._promises.items()):
            if held.deployment == deployment and held.epoch <= epoch and held.coordinator == coordinator:
                del self._promises[key]
        fence = (deployment, coordinator)
        self._fences[fence] = max(epoch, self._fences.pop(fence, epoch))
        while len(self._fences) > MAX_FENCES:
            self._fences.popitem(last=False)

    def lapse(self, now: float) -> list[Promise]:
        """Drop the uncommitted promises whose time is over."""
        gone = [promise for promise in self._promises.values() if promise.until is not None and promise.until <= now]
        for promise in gone:
            del self._promises[promise.deployment, promise.epoch]
        return gone

    def _check_turn(self, deployment: DeploymentId, epoch: int, coordinator: DeviceId) -> None:
        if epoch <= self._fences.get((deployment, coordinator), -1):
            raise RefusedError(f"epoch {epoch} of this deployment is over; ask with a later one")
        for promise in self._promises.values():
            if promise.deployment == deployment:
                if promise.coordinator != coordinator:
                    raise RefusedError("this deployment obeys another coordinator")
                if promise.epoch > epoch:
                    raise RefusedError(f"epoch {epoch} of this deployment is over; ask with a later one")
