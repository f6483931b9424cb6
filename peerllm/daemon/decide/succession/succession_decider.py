"""Who coordinates a deployment whose coordinator is lost, and who gives way when two meet. `handle(event, now)`.

A deployment's devices, in the order of its plan, follow each other. The first one that is left and has all that a
source needs finds out whether the devices that are here can hold the model. If they cannot, a silent coordinator is
waited for. Else it asks the others for their votes. A device votes once in a term, only while it does not hear the
coordinator itself, and from then on obeys whom it voted for; the others are told. With the votes of a strict majority
of the plan's devices the candidate takes the deployment over as it is loaded. Without sight of a majority (always so
with two devices) it serves the model as a new deployment. When two meet again, one takes no new sequences, ends those
that it streams, and lets go: of one deployment the coordinator of the earlier epoch, if most devices of its plan say
that they obeyed the other; else the one that was begun anew, if the other serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from peerllm.daemon.decide.succession.followed_deployment import EPOCHS_OF_TERM, FollowedDeployment
from peerllm.daemon.decide.succession.own_deployments import MAX_DEPLOYMENTS_KNOWN, OwnDeployments
from peerllm.daemon.decide.succession.succession_events import (
    CoordinatedPlan,
    DeploymentOver,
    Equipped,
    Obey,
    ObeyedTold,
    PlanTold,
    Presence,
    PresenceChanged,
    Refuse,
    ServiceSought,
    StreamsChanged,
    SuccessionAction,
    SuccessionEvent,
    TurnCame,
    VoteAsked,
    VoteCame,
)
from peerllm.types import DeploymentId, DeviceId

MAX_OF_COORDINATOR = 16  # deployments that are followed, so that one that tells of many leaves the others room


class Succession:
    """One device's part in the succession of all deployments that it knows of."""

    def __init__(self, me: DeviceId) -> None:
        self.me = me
        self._followed: dict[DeploymentId, FollowedDeployment] = {}
        self._own = OwnDeployments()
        self._claims: dict[DeploymentId, dict[DeviceId, CoordinatedPlan]] = {}  # what coordinators told last
        self._equipped: set[DeploymentId] = set()  # this device has what a source of these needs
        self._ended: dict[DeploymentId, None] = {}  # the last ones, first the oldest: nobody is to revive them
        self._latest: dict[DeploymentId, tuple[int, DeviceId]] = {}  # the latest epoch that was obeyed, and whose
        self._presence: dict[DeviceId, Presence] = {}
        self._outdated: set[DeviceId] = set()  # devices that were lost, and have told nothing since

    def handle(self, event: SuccessionEvent, now: float) -> list[SuccessionAction]:
        """Take one event; returns what is to be done, in order."""
        match event:
            case PlanTold(plan):
                return self._own_plan(plan) if plan.coordinator == self.me else self._told(plan, now)
            case ObeyedTold(device, coordinators):
                self._outdated.discard(device)  # it has told of its deployments just before
                self._own.obeyed_told(device, coordinators)
                own = tuple(self._own.plans.values())
                return [action for one in own for action in self._look_around(one)]
            case DeploymentOver():
                self._over(event, now)
                return self._own.other_over(event)
            case PresenceChanged(device, presence, renewed):
                if presence != "online":
                    self._outdated.add(device)
                elif not renewed:  # what it told while it was not heard still comes
                    self._outdated.discard(device)
                return self._present(device, presence, now)
            case Equipped(deployment, complete):
                (self._equipped.add if complete else self._equipped.discard)(deployment)
                if (known := self._followed.get(deployment)) is not None:
                    known.set_turn(complete, now)
                return []
            case VoteAsked():
                return [self._vote(event, now)]
            case VoteCame():
                return self._counted(event)
            case ServiceSought(deployment, feasible):
                known = self._followed.get(deployment)
                return known.sought(feasible, self._online, now) if known is not None else []
            case StreamsChanged(deployment, streaming):
                return self._own.streaming(deployment, streaming)
            case TurnCame():
                for known in tuple(self._followed.values()):
                    if known.vote_ended(now):
                        self._obey_again(known, now)
                served = {one for plan in self._own.plans.values() for one in (plan.deployment, plan.succeeds)}
                followed = tuple(self._followed.items())
                return [done for of, one in followed for done in one.turn(of in served, self._online, now)]
            case _:
                assert_never(event)

    def deadline(self) -> float | None:
        """When a TurnCame is wanted next."""
        return min((due for one in self._followed.values() if (due := one.deadline) is not None), default=None)

    @property
    def coordinators(self) -> Mapping[DeploymentId, DeviceId]:
        """Whom this device obeys in each deployment that it knows of."""
        own = dict.fromkeys(self._own.plans, self.me)
        return {one: known.plan.coordinator for one, known in self._followed.items()} | own

    @property
    def followed(self) -> Mapping[DeploymentId, CoordinatedPlan]:
        """The deployments that other devices coordinate."""
        return {one: known.plan for one, known in self._followed.items()}

    @property
    def obeyed(self) -> Mapping[DeploymentId, DeviceId]:
        """Whom this device has obeyed at the latest epoch of each deployment that it has a part in: others' proof."""
        known = self._followed.items()
        mine = [(deployment, one.plan.coordinator) for deployment, one in known if self.me in one.plan.devices]
        return {deployment: self._latest.get(deployment, (0, present))[1] for deployment, present in mine}

    def hands_over(self, deployment: DeploymentId, device: DeviceId) -> bool:
        """Whether the device may leave answers to this one, which goes on with the deployment."""
        return self._own.had_part(deployment, device)

    @property
    def _online(self) -> frozenset[DeviceId]:
        return frozenset(device for device, presence in self._presence.items() if presence == "online")

    # ---- hearing of deployments -----------------------------------------------------------------------------------

    def _own_plan(self, plan: CoordinatedPlan) -> list[SuccessionAction]:
        self._ended.pop(plan.deployment, None)
        self._own.coordinate(plan)
        return self._look_around(plan)

    def _look_around(self, own: CoordinatedPlan) -> list[SuccessionAction]:
        told = [plan for claims in self._claims.values() for plan in claims.values()]
        away = self._outdated | {device for device, presence in self._presence.items() if presence != "online"}
        return [action for one in told if one.coordinator not in away for action in self._own.met(own, one)]

    def _told(self, plan: CoordinatedPlan, now: float) -> list[SuccessionAction]:
        known = self._followed.get(plan.deployment)
        if known is None and not self._has_room(plan.coordinator):
            return []
        if known is None:
            known = self._followed[plan.deployment] = FollowedDeployment(self.me, plan)
        self._claims.setdefault(plan.deployment, {})[plan.coordinator] = plan
        self._ended.pop(plan.deployment, None)
        if known.told(plan):
            self._has_obeyed(plan.deployment, plan.epoch, plan.coordinator)
            if plan.deployment not in self._own.plans:
                self._own.obeyed(plan)
        self._find_lost(known, now)
        own = tuple(self._own.plans.values())
        return [action for one in own for action in self._own.met(one, plan)]

    def _has_room(self, coordinator: DeviceId) -> bool:
        """Whether one more deployment can be followed, of that coordinator."""
        own = sum(known.plan.coordinator == coordinator for known in self._followed.values())
        return own < MAX_OF_COORDINATOR and len(self._followed) < MAX_DEPLOYMENTS_KNOWN

    def _has_obeyed(self, deployment: DeploymentId, epoch: int, coordinator: DeviceId) -> None:
        """Kept also where nobody is followed for a while; the longest unheard of are forgotten first."""
        self._latest[deployment] = max(self._latest.pop(deployment, (-1, "")), (epoch, coordinator))
        while len(self._latest) > 2 * MAX_DEPLOYMENTS_KNOWN:
            del self._latest[next(iter(self._latest))]

    def _over(self, over: DeploymentOver, now: float) -> None:
        deployment, known = over.deployment, self._followed.get(over.deployment)
        claims = self._claims.get(deployment, {})
        claims.pop(over.coordinator, None)
        ended = (deployment in self._own.plans) == (over.coordinator == self.me)
        if over.coordinator == self.me:
            self._own.over(deployment)
        elif known is None or known.plan.coordinator != over.coordinator:
            if known is not None and known.former is not None and known.former.coordinator == over.coordinator:
                known.former_over = True
            return
        elif claims:  # another device goes on with it
            known.obey(max(claims.values(), key=lambda plan: (plan.epoch, plan.coordinator)))
            self._find_lost(known, now)
            return
        else:
            del self._followed[deployment]
            self._claims.pop(deployment, None)
        if ended:
            self._ended[deployment] = None
        while len(self._ended) > MAX_DEPLOYMENTS_KNOWN:
            del self._ended[next(iter(self._ended))]

    def _obey_again(self, known: FollowedDeployment, now: float) -> None:
        """The vote for another was in vain, and whom this device obeyed before may have let go meanwhile."""
        if known.former_over:
            self._over(DeploymentOver(known.plan.deployment, known.plan.coordinator), now)
        else:
            self._find_lost(known, now)

    # ---- losing a coordinator -------------------------------------------------------------------------------------

    def _present(self, device: DeviceId, presence: Presence, now: float) -> list[SuccessionAction]:
        self._presence[device] = presence
        for known in self._followed.values():
            if known.plan.coordinator != device:
                if presence == "online":  # with it there may be memory enough
                    known.set_turn(known.plan.deployment in self._equipped, now)
            elif presence == "online":
                known.heard()
            else:
                self._find_lost(known, now)
        return []

    def _find_lost(self, known: FollowedDeployment, now: float) -> None:
        presence = self._presence.get(known.plan.coordinator, "online")
        if presence != "online":
            known.lose(presence == "gone", known.plan.deployment in self._equipped, now)

    def _vote(self, asked: VoteAsked, now: float) -> SuccessionAction:
        deployment, candidate = asked.plan.deployment, asked.candidate
        if reason := self._against(asked):
            return Refuse(deployment, candidate, reason)
        known = self._followed.setdefault(deployment, FollowedDeployment(self.me, asked.plan))
        self._has_obeyed(deployment, asked.plan.epoch + EPOCHS_OF_TERM * asked.term, candidate)  # if it wins
        known.vote(asked, now)
        self._find_lost(known, now)
        return Obey(deployment, candidate, asked.term)

    def _against(self, asked: VoteAsked) -> str:
        """Why this device does not vote for the candidate; "": it does, also where it obeys nobody yet."""
        if asked.plan.deployment in self._own.plans:
            return "this device coordinates it"
        if asked.plan.deployment in self._ended:
            return "it has ended"
        if asked.candidate not in asked.plan.devices or self.me not in asked.plan.devices:
            return "not both are of its plan"
        if (known := self._followed.get(asked.plan.deployment)) is not None:
            return known.against(asked)
        return "" if self._has_room(asked.candidate) else "too many deployments are known here"

    def _counted(self, came: VoteCame) -> list[SuccessionAction]:
        known = self._followed.get(came.deployment)
        taken = known.counted(came) if known is not None else None
        if known is None or taken is None:
            return []
        self._own.coordinate(replace(known.plan, coordinator=self.me, serving=False))
        del self._followed[came.deployment]
        return [taken]
