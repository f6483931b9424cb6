"""The memory that this device promised to deployments, never more in sum than its owner lends. Sans-I/O.

Epochs of a deployment that stand side by side share what both load, so a later one counts only what it adds.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from peerllm.daemon.control_messages import Reserve
from peerllm.errors import PastEpochError, RefusedError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import DeploymentId, DeviceId

MAX_PROMISES = 32  # epochs of one coordinator that memory is promised to at once
MAX_LEASE_S = 600.0  # an uncommitted promise lives no longer, whatever the coordinator asks
MAX_FENCES = 64  # released deployments of one coordinator remembered, so that a late question cannot revive one


@dataclass(frozen=True, slots=True)
class Promise:
    """`until` is when an uncommitted one lapses; None once it is committed."""

    deployment: DeploymentId
    epoch: int
    coordinator: DeviceId
    nbytes: int  # all that the epoch needs ...
    added_bytes: int  # ... and the part of it that was not promised to earlier epochs when it was reserved
    until: float | None


def added_to(promised_bytes: int, nbytes: int, added_bytes: int | None) -> int:
    """What an epoch adds to what earlier ones were promised; what they do not have it cannot share with them."""
    return nbytes if added_bytes is None or not promised_bytes else max(added_bytes, nbytes - promised_bytes)


class EpochSum:
    """What one device holds or will hold for one deployment, all its epochs together; the pure sum behind a ledger."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._epochs: dict[int, tuple[int, int]] = {}  # epoch: (all that it needs, what it added when it came)

    def __bool__(self) -> bool:
        return bool(self._epochs)

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._epochs

    def add(self, epoch: int, nbytes: int, added_bytes: int | None) -> None:
        """Count an epoch; beside earlier ones only `added_bytes`, where those are told."""
        added = added_to(self.nbytes if self._epochs else 0, nbytes, added_bytes)
        self._epochs[epoch] = nbytes, added
        self.nbytes += added

    def end(self, first: int, last: int) -> None:
        """Epochs first..last are over. What remains needs no more than before, and no more than the sum of each."""
        for epoch in sorted((one for one in self._epochs if first <= one <= last), reverse=True):
            latest = epoch == max(self._epochs)
            _, added = self._epochs.pop(epoch)
            rest = sum(nbytes for nbytes, _ in self._epochs.values())
            self.nbytes = min(self.nbytes - (added if latest else 0), rest)

    @property
    def first(self) -> int:
        """The earliest epoch."""
        return min(self._epochs)


class Ledger:
    """All promises of one device; `now` is any clock that only rises."""

    def __init__(self, lent_bytes: int) -> None:
        self.lent_bytes = lent_bytes
        self.leaving = ""  # why nothing is promised any more
        self.full = False  # the machine has no memory for more than is promised already
        self._promises: dict[tuple[DeploymentId, int], Promise] = {}
        self._sums: dict[DeploymentId, EpochSum] = {}
        self._fences: dict[DeviceId, OrderedDict[DeploymentId, int]] = {}  # epochs, by coordinator

    @property
    def promised_bytes(self) -> int:
        return sum(one.nbytes for one in self._sums.values())

    @property
    def free_bytes(self) -> int:
        return 0 if self.leaving or self.full else self.lent_bytes - self.promised_bytes

    @property
    def offered_bytes(self) -> int:
        """What the household is told that this device lends."""
        return min(self.lent_bytes, self.promised_bytes) if self.full else self.lent_bytes

    def promised_to(self, deployment: DeploymentId) -> int:
        """All that is promised to a deployment, what its epochs share counted once."""
        return self._sums[deployment].nbytes if deployment in self._sums else 0

    def promises(self) -> tuple[Promise, ...]:
        return tuple(self._promises.values())

    def promise(self, deployment: DeploymentId, epoch: int) -> Promise | None:
        return self._promises.get((deployment, epoch))

    def reserve(self, asked: Reserve, coordinator: DeviceId, now: float) -> None:
        """Promise memory for a bounded time; asking again with the same size renews it. RefusedError says why not."""
        self.lapse(now)
        if self.leaving:
            raise RefusedError(f"it takes part in nothing now: {self.leaving}")
        if min(asked.nbytes, asked.added_bytes or 0) < 0 or not 0 < asked.lease_s <= MAX_LEASE_S:
            raise RefusedError(f"a reservation of {asked.nbytes} bytes for {asked.lease_s} s makes no sense")
        self._check_turn(asked.deployment, asked.epoch, coordinator)
        key = (asked.deployment, asked.epoch)
        held = self._promises.get(key)
        if held is not None and held.until is None:
            raise RefusedError("this epoch is already committed here; release it first")
        mine = held.added_bytes if held is not None else 0
        needed = added_to(self.promised_to(asked.deployment) - mine, asked.nbytes, asked.added_bytes)
        free = self.free_bytes + mine
        if needed > free:
            lent = human_bytes(self.lent_bytes)
            raise RefusedError(f"{human_bytes(needed)} are asked for, {human_bytes(free)} of {lent} are free")
        given = sum(one.coordinator == coordinator for one in self._promises.values())
        if held is None and given >= MAX_PROMISES:
            raise RefusedError(f"{MAX_PROMISES} promises are given to you already; stop a model first")
        if held is not None:
            self._drop(held)
        self._sums.setdefault(asked.deployment, EpochSum()).add(asked.epoch, asked.nbytes, asked.added_bytes)
        self._promises[key] = Promise(
            asked.deployment, asked.epoch, coordinator, asked.nbytes, needed, now + asked.lease_s
        )

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

    def release(self, deployment: DeploymentId, epoch: int, coordinator: DeviceId, only: bool = False) -> None:
        """Take back the promises to a coordinator's deployment up to `epoch`, and refuse it those epochs from now on.

        `only`: earlier epochs keep theirs.

        Nobody but the coordinator is refused anything: a device must not be able to shut out another's deployment.
        """
        for held in list(self._promises.values()):
            over = held.epoch == epoch if only else held.epoch <= epoch
            if held.deployment == deployment and over and held.coordinator == coordinator:
                self._drop(held)
        fences = self._fences.setdefault(coordinator, OrderedDict())
        fences[deployment] = max(epoch, fences.pop(deployment, epoch))
        while len(fences) > MAX_FENCES:
            fences.popitem(last=False)

    def hand_over(self, deployment: DeploymentId, coordinator: DeviceId) -> None:
        """A deployment has another coordinator: what was kept for it stays, what was only reserved is dropped."""
        for key, held in list(self._promises.items()):
            if held.deployment == deployment and held.coordinator != coordinator:
                if held.until is not None:
                    self._drop(held)
                else:
                    self._promises[key] = replace(held, coordinator=coordinator)

    def lapse(self, now: float) -> list[Promise]:
        """Drop the uncommitted promises whose time is over."""
        gone = [promise for promise in self._promises.values() if promise.until is not None and promise.until <= now]
        for promise in gone:
            self._drop(promise)
        return gone

    def _drop(self, promise: Promise) -> None:
        del self._promises[promise.deployment, promise.epoch]
        epochs = self._sums[promise.deployment]
        epochs.end(promise.epoch, promise.epoch)
        if not epochs:
            del self._sums[promise.deployment]

    def _check_turn(self, deployment: DeploymentId, epoch: int, coordinator: DeviceId) -> None:
        if coordinator in self._fences and epoch <= self._fences[coordinator].get(deployment, -1):
            raise RefusedError(f"epoch {epoch} of this deployment is over; ask with a later one")
        for promise in self._promises.values():
            if promise.deployment == deployment:
                if promise.coordinator != coordinator:
                    raise RefusedError("this deployment obeys another coordinator")
                if promise.epoch > epoch:
                    raise PastEpochError(f"epoch {epoch} of this deployment is over; ask with a later one")
