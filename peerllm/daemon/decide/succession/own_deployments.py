"""The deployments that this device coordinates: which of them gives way to another device's, and when."""

from __future__ import annotations

from collections.abc import Mapping

from peerllm.daemon.decide.succession.succession_events import (
    CoordinatedPlan,
    DeploymentOver,
    Drain,
    DrainNoMore,
    GiveWay,
    Stay,
    SuccessionAction,
)
from peerllm.types import DeploymentId, DeviceId

MAX_DEPLOYMENTS_KNOWN = 1024


class OwnDeployments:
    """`plans` are those of this device, as it tells them."""

    def __init__(self) -> None:
        self.plans: dict[DeploymentId, CoordinatedPlan] = {}
        self._streaming: set[DeploymentId] = set()
        self._yielding: dict[DeploymentId, CoordinatedPlan] = {}  # those that drain, and for which
        self._plans_with: dict[
            DeploymentId, dict[DeviceId, tuple[DeviceId, ...]]
        ] = {}  # own, the last with each device
        self._obeyed: dict[DeviceId, Mapping[DeploymentId, DeviceId]] = {}  # as each device says
        self._took_part: dict[DeploymentId, set[DeviceId]] = {}  # in plans of coordinators that were this device's own

    def coordinate(self, plan: CoordinatedPlan) -> None:
        """This device coordinates it, by that plan."""
        self.plans[plan.deployment] = plan
        self._plans_with.setdefault(plan.deployment, {}).update(dict.fromkeys(plan.devices, plan.devices))
        self.obeyed(plan)

    def obeyed_told(self, device: DeviceId, coordinators: Mapping[DeploymentId, DeviceId]) -> None:
        """Another device says whom it has obeyed."""
        self._obeyed[device] = coordinators

    def obeyed(self, plan: CoordinatedPlan) -> None:
        """This device obeys the plan's coordinator: no devices but those of its plans are believed to follow it."""
        self._took_part.setdefault(plan.succeeds or plan.deployment, set()).update(plan.devices)
        while len(self._took_part) > MAX_DEPLOYMENTS_KNOWN:
            del self._took_part[next(iter(self._took_part))]

    def had_part(self, deployment: DeploymentId, device: DeviceId) -> bool:
        """Whether the device ever was of a plan whose coordinator this device obeyed."""
        plan = self.plans.get(deployment)
        return plan is not None and device in self._took_part.get(plan.succeeds or deployment, ())

    def over(self, deployment: DeploymentId) -> None:
        """This device coordinates it no longer."""
        self.plans.pop(deployment, None)
        self._plans_with.pop(deployment, None)
        self._yielding.pop(deployment, None)
        self._streaming.discard(deployment)

    def met(self, own: CoordinatedPlan, other: CoordinatedPlan) -> list[SuccessionAction]:
        """Another device is here that coordinates `other`: where both are one deployment, one drains and gives way.

        What is known of the other may be late, so only one of the two chooses: the other follows from what it tells.
        """
        if own.deployment in self._yielding or not self._rivals(own, other):
            return []
        if own.deployment == other.deployment:
            gives_way = _chooses(own, other) and self._is_left_for(own.deployment, other.coordinator)
        elif not _chooses(own, other):
            gives_way = other.stays and not own.stays
        elif other.serving:
            gives_way = other.stays or not own.stays
        else:
            return [Stay(own.deployment)] if own.serving and not own.stays else []
        if not gives_way:
            return []
        self._yielding[own.deployment] = other
        return [Drain(own.deployment, other.coordinator, other.deployment), *self.drained(own.deployment)]

    def streaming(self, deployment: DeploymentId, streaming: bool) -> list[SuccessionAction]:
        """Whether answers are being streamed by one of them."""
        (self._streaming.add if streaming else self._streaming.discard)(deployment)
        return self.drained(deployment)

    def drained(self, deployment: DeploymentId) -> list[SuccessionAction]:
        """A deployment that drains gives way once its answers have ended."""
        other = self._yielding.get(deployment)
        if other is None or deployment in self._streaming or deployment not in self.plans:
            return []
        del self._yielding[deployment], self.plans[deployment], self._plans_with[deployment]
        return [GiveWay(deployment, other.coordinator)]

    def other_over(self, over: DeploymentOver) -> list[SuccessionAction]:
        """Another device's deployment is over: what drains for it goes on here."""
        ended = over.deployment, over.coordinator
        kept = [own for own, other in self._yielding.items() if (other.deployment, other.coordinator) == ended]
        for own in kept:
            del self._yielding[own]
        return [DrainNoMore(own) for own in kept]

    def _is_left_for(self, deployment: DeploymentId, rival: DeviceId) -> bool:
        """Whether most devices of the last plan here that the rival was of obey it: its own word is not enough."""
        me = self.plans[deployment].coordinator
        devices = self._plans_with.get(deployment, {}).get(rival, (me, rival))
        obeying = [one for one in devices if one == rival or self._obeyed.get(one, {}).get(deployment) == rival]
        return 2 * len(obeying) > len(devices)

    def _rivals(self, own: CoordinatedPlan, other: CoordinatedPlan) -> bool:
        """Whether both are the same deployment, or begun anew for it, by a device that ever had a part in it."""
        same = (own.succeeds or own.deployment) == (other.succeeds or other.deployment)
        return same and self.had_part(own.deployment, other.coordinator)


def _chooses(own: CoordinatedPlan, other: CoordinatedPlan) -> bool:
    """Whether `own` is the one that gives way unless the other does not serve; the same whenever it is asked."""
    if own.deployment == other.deployment:  # a majority obeys the later one, and refuses the other everything
        return (own.epoch, own.coordinator) < (other.epoch, other.coordinator)
    if bool(own.succeeds) != bool(other.succeeds):
        return bool(own.succeeds)  # what was begun anew, before what it was begun for
    return own.coordinator < other.coordinator
