"""Who coordinates a deployment whose coordinator is lost, and who gives way when two meet. `handle(event, now)`.

A deployment's devices, in the order of its plan, follow each other. The first one that is left and has all that a
source needs asks the others for their votes. A device votes once in a term, only while it does not hear the coordinator
itself, and from then on obeys whom it voted for; the others are told. With the votes of a strict majority of the plan's
devices the candidate takes the deployment over as it is loaded. Without sight of a majority (always so with two
devices) it serves the model as a new deployment, if it can hold it. When two meet again, one takes no new sequences,
ends those that it streams, and lets go: of one deployment the coordinator of the earlier epoch, if most devices of its
plan say that they obeyed the other; else the one that was begun anew, if the other serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

from peerllm.types import DeploymentId, DeviceId

GONE_S = 1.0  # a coordinator whose process ended may be back at once: a restart takes less than what follows
SILENT_S = 3.0  # a silent coordinator is waited for this long; its own devices go on without it no sooner
TURN_S = 1.5  # each further device in the plan's order waits this much longer
VOTE_S = 2.0  # votes that have not come by then count as refused; the next term begins a turn later
BOUND_S = 5.0  # a vote binds for so long, unless its candidate takes over
ANEW_S = 6.0  # without a majority in sight for so long the model is served as a new deployment
EPOCHS_OF_TERM = 2000  # more than a coordinator uses up that nobody obeys; one that restarts skips a thousand
MAX_DEPLOYMENTS_KNOWN = 1024
MAX_OF_COORDINATOR = 16  # of those, so that one that tells of many leaves the others room

Presence = Literal["online", "silent", "gone"]


@dataclass(frozen=True, slots=True)
class CoordinatedPlan:
    """A deployment as its coordinator tells it: `devices` in the order of the plan, each once."""

    deployment: DeploymentId
    coordinator: DeviceId
    devices: tuple[DeviceId, ...]
    epoch: int
    serving: bool
    succeeds: DeploymentId = ""  # the deployment that this one was begun anew for


# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanTold:
    """A coordinator, this device or another, told of a deployment."""

    plan: CoordinatedPlan


@dataclass(frozen=True, slots=True)
class ObeyedTold:
    """Another device says whom it has obeyed in the deployments that it has a part in (`Succession.obeyed`)."""

    device: DeviceId
    coordinators: Mapping[DeploymentId, DeviceId]


@dataclass(frozen=True, slots=True)
class DeploymentOver:
    """A coordinator, this device or another, lets go of a deployment; `ended`: for good, so that nobody follows."""

    deployment: DeploymentId
    coordinator: DeviceId
    ended: bool = False


@dataclass(frozen=True, slots=True)
class PresenceChanged:
    """Another device is heard, silent, or gone."""

    device: DeviceId
    presence: Presence


@dataclass(frozen=True, slots=True)
class Equipped:
    """This device now has (or no longer has) all that a source of the deployment needs."""

    deployment: DeploymentId
    complete: bool = True


@dataclass(frozen=True, slots=True)
class VoteAsked:
    """Another device asks for this device's vote."""

    candidate: DeviceId
    plan: CoordinatedPlan  # as the candidate knows it
    term: int


@dataclass(frozen=True, slots=True)
class VoteCame:
    """The answer to AskVotes of one device."""

    voter: DeviceId
    deployment: DeploymentId
    term: int
    granted: bool


@dataclass(frozen=True, slots=True)
class StreamsChanged:
    """Whether answers are being streamed by a deployment that this device coordinates."""

    deployment: DeploymentId
    streaming: bool


@dataclass(frozen=True, slots=True)
class TurnCame:
    """The time that `deadline` named has come."""


SuccessionEvent = (
    PlanTold
    | ObeyedTold
    | DeploymentOver
    | PresenceChanged
    | Equipped
    | VoteAsked
    | VoteCame
    | StreamsChanged
    | TurnCame
)


# ---- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskVotes:
    """Ask these devices; each answers with VoteCame. `plan` is the last one that this device knows of."""

    plan: CoordinatedPlan
    term: int
    devices: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class Obey:
    """The vote is given: from now on the deployment's shards here obey the candidate."""

    deployment: DeploymentId
    candidate: DeviceId
    term: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The vote is not given, for this reason."""

    deployment: DeploymentId
    candidate: DeviceId
    reason: str


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Coordinate the deployment from now on, with epochs after `epoch`, which grows with the term of the votes."""

    deployment: DeploymentId
    epoch: int


@dataclass(frozen=True, slots=True)
class ServeAnew:
    """Serve the deployment's model as a new deployment, with what this device can reach."""

    deployment: DeploymentId


@dataclass(frozen=True, slots=True)
class Drain:
    """Let the deployment take no new sequences: it ends when those that run have ended. `to` goes on with it."""

    deployment: DeploymentId
    to: DeviceId


@dataclass(frozen=True, slots=True)
class GiveWay:
    """Stop coordinating the deployment here: `to` goes on with it."""

    deployment: DeploymentId
    to: DeviceId


SuccessionAction = AskVotes | Obey | Refuse | TakeOver | ServeAnew | Drain | GiveWay


@dataclass(slots=True)
class _Candidacy:
    """This device's attempt to follow."""

    term: int
    until: float
    votes: set[DeviceId] = field(default_factory=set)


@dataclass(slots=True)
class _Followed:
    """What is known of one deployment that another device coordinates."""

    plan: CoordinatedPlan
    lost_at: float | None = None  # since when its coordinator is not heard
    voted_at: float | None = None  # when this device voted for the coordinator, which has not told of a plan since
    term: int = 0  # the last one that this device voted in, for itself or another
    due: float | None = None  # when this device's turn comes
    candidacy: _Candidacy | None = None
    anew: bool = False  # served as a new deployment already


class Succession:
    """One device's part in the succession of all deployments that it knows of."""

    def __init__(self, me: DeviceId) -> None:
        self.me = me
        self._followed: dict[DeploymentId, _Followed] = {}
        self._own: dict[DeploymentId, CoordinatedPlan] = {}
        self._equipped: set[DeploymentId] = set()  # this device has what a source of these needs
        self._streaming: set[DeploymentId] = set()
        self._yielding: dict[DeploymentId, DeviceId] = {}  # own deployments that drain, and for whom
        self._ended: dict[DeploymentId, None] = {}  # the last ones, first the oldest: nobody is to revive them
        self._took_part: dict[DeploymentId, set[DeviceId]] = {}  # in plans of coordinators that were this device's own
        self._plans_with: dict[
            DeploymentId, dict[DeviceId, tuple[DeviceId, ...]]
        ] = {}  # own, the last with each device
        self._latest: dict[
            DeploymentId, tuple[int, DeviceId]
        ] = {}  # the latest epoch that was obeyed, and its coordinator
        self._obeyed: dict[DeviceId, Mapping[DeploymentId, DeviceId]] = {}  # as each device says
        self._presence: dict[DeviceId, Presence] = {}

    def handle(self, event: SuccessionEvent, now: float) -> list[SuccessionAction]:
        """Take one event; returns what is to be done, in order."""
        match event:
            case PlanTold(plan):
                return self._own_plan(plan) if plan.coordinator == self.me else self._told(plan, now)
            case ObeyedTold(device, coordinators):
                self._obeyed[device] = coordinators
                return [action for own in tuple(self._own.values()) for action in self._look_around(own)]
            case DeploymentOver():
                return self._over(event)
            case PresenceChanged(device, presence):
                return self._present(device, presence, now)
            case Equipped(deployment, complete):
                (self._equipped.add if complete else self._equipped.discard)(deployment)
                if (known := self._followed.get(deployment)) is not None:
                    self._set_turn(known, now)
                return []
            case VoteAsked():
                return [self._vote(event, now)]
            case VoteCame():
                return self._counted(event, now)
            case StreamsChanged(deployment, streaming):
                (self._streaming.add if streaming else self._streaming.discard)(deployment)
                return self._drained(deployment)
            case TurnCame():
                return self._turns(now)
            case _:
                assert_never(event)

    def deadline(self) -> float | None:
        """When a TurnCame is wanted next."""
        times = [known.due for known in self._followed.values() if known.due is not None]
        times += [known.candidacy.until for known in self._followed.values() if known.candidacy is not None]
        return min(times, default=None)

    @property
    def coordinators(self) -> Mapping[DeploymentId, DeviceId]:
        """Whom this device obeys in each deployment that it knows of."""
        return {one: known.plan.coordinator for one, known in self._followed.items()} | dict.fromkeys(
            self._own, self.me
        )

    @property
    def obeyed(self) -> Mapping[DeploymentId, DeviceId]:
        """Whom this device has obeyed at the latest epoch of each deployment that it has a part in: others' proof."""
        known = self._followed.items()
        mine = [(deployment, one.plan.coordinator) for deployment, one in known if self.me in one.plan.devices]
        return {deployment: self._latest.get(deployment, (0, present))[1] for deployment, present in mine}

    @property
    def followed(self) -> Mapping[DeploymentId, CoordinatedPlan]:
        """The deployments that other devices coordinate."""
        return {one: known.plan for one, known in self._followed.items()}

    # ---- hearing of deployments -----------------------------------------------------------------------------------

    def _own_plan(self, plan: CoordinatedPlan) -> list[SuccessionAction]:
        self._coordinate(plan)
        return self._look_around(plan)

    def _coordinate(self, plan: CoordinatedPlan) -> None:
        self._own[plan.deployment] = plan
        self._plans_with.setdefault(plan.deployment, {}).update(dict.fromkeys(plan.devices, plan.devices))
        self._take_part(plan)

    def _look_around(self, own: CoordinatedPlan) -> list[SuccessionAction]:
        here = [known.plan for known in self._followed.values() if known.lost_at is None]
        return [action for other in here if self._rivals(own, other) for action in self._met(own, other)]

    def _told(self, plan: CoordinatedPlan, now: float) -> list[SuccessionAction]:
        known = self._followed.get(plan.deployment)
        if known is None:
            if not self._has_room(plan.coordinator):
                return []
            known = self._followed[plan.deployment] = _Followed(plan)
            self._has_obeyed(plan.deployment, plan.epoch, plan.coordinator)
            if plan.deployment not in self._own:
                self._take_part(plan)
        elif plan.coordinator == known.plan.coordinator or known.lost_at is not None or self._in_vain(known, now):
            known.plan, known.voted_at = plan, None
            self._has_obeyed(plan.deployment, plan.epoch, plan.coordinator)
            if plan.deployment not in self._own:
                self._take_part(plan)
        known.lost_at = known.due = known.candidacy = None
        if self._presence.get(known.plan.coordinator, "online") != "online":
            self._lose(known, now)
        rivals = [own for own in self._own.values() if self._rivals(own, plan)]
        return [action for own in rivals for action in self._met(own, plan)]

    def _has_room(self, coordinator: DeviceId) -> bool:
        """Whether one more deployment can be followed, of that coordinator."""
        own = sum(known.plan.coordinator == coordinator for known in self._followed.values())
        return own < MAX_OF_COORDINATOR and len(self._followed) < MAX_DEPLOYMENTS_KNOWN

    def _has_obeyed(self, deployment: DeploymentId, epoch: int, coordinator: DeviceId) -> None:
        """Kept also where nobody is followed for a while; the longest unheard of are forgotten first."""
        self._latest[deployment] = max(self._latest.pop(deployment, (-1, "")), (epoch, coordinator))
        while len(self._latest) > 2 * MAX_DEPLOYMENTS_KNOWN:
            del self._latest[next(iter(self._latest))]

    def _take_part(self, plan: CoordinatedPlan) -> None:
        """The devices of a plan whose coordinator is obeyed here: no others are believed to follow it."""
        self._took_part.setdefault(plan.deployment, set()).update(plan.devices)
        while len(self._took_part) > MAX_DEPLOYMENTS_KNOWN:
            del self._took_part[next(iter(self._took_part))]

    def _rivals(self, own: CoordinatedPlan, other: CoordinatedPlan) -> bool:
        """Whether both are the same deployment, or begun anew for it, by a device that ever had a part in it."""
        first = own.succeeds or own.deployment
        return first == (other.succeeds or other.deployment) and other.coordinator in self._took_part.get(first, ())

    @staticmethod
    def _in_vain(known: _Followed, now: float) -> bool:
        """Whether the candidate that this device voted for should have taken over by now."""
        return known.voted_at is not None and now - known.voted_at > BOUND_S

    def _over(self, over: DeploymentOver) -> list[SuccessionAction]:
        if over.coordinator == self.me:
            self._own.pop(over.deployment, None)
            self._plans_with.pop(over.deployment, None)
            self._yielding.pop(over.deployment, None)
            self._streaming.discard(over.deployment)
        elif (known := self._followed.get(over.deployment)) is not None and known.plan.coordinator == over.coordinator:
            del self._followed[over.deployment]
        if over.ended:
            self._ended[over.deployment] = None
            while len(self._ended) > MAX_DEPLOYMENTS_KNOWN:
                del self._ended[next(iter(self._ended))]
        return []

    # ---- losing a coordinator -------------------------------------------------------------------------------------

    def _present(self, device: DeviceId, presence: Presence, now: float) -> list[SuccessionAction]:
        self._presence[device] = presence
        for known in self._followed.values():
            if known.plan.coordinator != device:
                continue
            if presence == "online":
                known.lost_at = known.due = known.candidacy = None
            else:
                self._lose(known, now)
        return []

    def _lose(self, known: _Followed, now: float) -> None:
        known.lost_at = now if known.lost_at is None else known.lost_at
        self._set_turn(known, now)

    def _set_turn(self, known: _Followed, now: float) -> None:
        """When this device stands up, if nobody before it does."""
        if (
            known.lost_at is None
            or known.plan.deployment not in self._equipped
            or known.candidacy is not None
            or known.anew
        ):
            known.due = None
            return
        gone = self._presence.get(known.plan.coordinator) == "gone"
        known.due = max(now, known.lost_at + (GONE_S if gone else SILENT_S) + self._place(known) * TURN_S)

    def _place(self, known: _Followed) -> int:
        """This device's place among those that may follow, from 0."""
        followers = [device for device in known.plan.devices if device != known.plan.coordinator]
        return followers.index(self.me) if self.me in followers else len(followers)

    def _turns(self, now: float) -> list[SuccessionAction]:
        actions: list[SuccessionAction] = []
        for known in tuple(self._followed.values()):
            if known.candidacy is not None and known.candidacy.until <= now:
                known.candidacy = None
                known.due = now + TURN_S * (1 + self._place(known))  # candidates of one instant part here
            if known.due is not None and known.due <= now:
                actions += self._stand(known, now)
        return actions

    def _stand(self, known: _Followed, now: float) -> list[SuccessionAction]:
        known.due = None
        if known.plan.deployment in self._own or known.lost_at is None:
            return []
        others = [device for device in known.plan.devices if device != self.me]
        reachable = [device for device in others if self._presence.get(device) == "online"]
        if not self._majority(known, 1 + len(reachable)):
            if now - known.lost_at < ANEW_S:
                known.due = known.lost_at + ANEW_S
                return []
            known.anew = True
            return [ServeAnew(known.plan.deployment)]
        known.term += 1
        known.candidacy = _Candidacy(known.term, now + VOTE_S, {self.me})
        return [AskVotes(known.plan, known.term, tuple(reachable))]

    def _majority(self, known: _Followed, count: int) -> bool:
        return self.me in known.plan.devices and 2 * count > len(known.plan.devices)

    def _vote(self, asked: VoteAsked, now: float) -> SuccessionAction:
        deployment, candidate = asked.plan.deployment, asked.candidate
        if reason := self._against(asked):
            return Refuse(deployment, candidate, reason)
        known = self._followed.setdefault(deployment, _Followed(asked.plan))
        known.term, known.candidacy, known.voted_at = asked.term, None, now
        self._has_obeyed(deployment, asked.plan.epoch + EPOCHS_OF_TERM * asked.term, candidate)  # if it wins
        self._obey(known, candidate, asked.plan.epoch, now)
        return Obey(deployment, candidate, asked.term)

    def _against(self, asked: VoteAsked) -> str:
        """Why this device does not vote for the candidate; "": it does, also where it obeys nobody yet."""
        known = self._followed.get(asked.plan.deployment)
        if asked.plan.deployment in self._own:
            return "this device coordinates it"
        if asked.plan.deployment in self._ended:
            return "it has ended"
        if asked.candidate not in asked.plan.devices or self.me not in asked.plan.devices:
            return "not both are of its plan"
        if known is None:
            return "" if self._has_room(asked.candidate) else "too many deployments are known here"
        if known.lost_at is None and known.voted_at is None:
            return "its coordinator is heard here"
        if asked.candidate not in known.plan.devices:
            return "the candidate is not of its plan"
        if asked.plan.epoch < known.plan.epoch:
            return f"epoch {known.plan.epoch} is known here"
        return "the vote of this term is given" if asked.term <= known.term else ""

    def _obey(self, known: _Followed, coordinator: DeviceId, epoch: int, now: float) -> None:
        known.plan = replace(known.plan, coordinator=coordinator, epoch=epoch, serving=False)
        known.lost_at = known.due = None
        if self._presence.get(coordinator, "online") != "online":
            self._lose(known, now)

    def _counted(self, came: VoteCame, now: float) -> list[SuccessionAction]:
        known = self._followed.get(came.deployment)
        candidacy = known.candidacy if known is not None else None
        if known is None or candidacy is None or candidacy.term != came.term:
            return []
        if came.granted and came.voter in known.plan.devices:
            candidacy.votes.add(came.voter)
        if not self._majority(known, len(candidacy.votes)):
            return []
        epoch, deployment = known.plan.epoch + EPOCHS_OF_TERM * came.term, came.deployment
        self._coordinate(replace(known.plan, coordinator=self.me, serving=False))
        del self._followed[deployment]
        return [TakeOver(deployment, epoch)]

    # ---- meeting again --------------------------------------------------------------------------------------------

    def _met(self, own: CoordinatedPlan, other: CoordinatedPlan) -> list[SuccessionAction]:
        """Two devices coordinate what is one deployment: the one that gives way drains first."""
        if own.deployment in self._yielding or not self._gives_way(own, other):
            return []
        self._yielding[own.deployment] = other.coordinator
        drain: list[SuccessionAction] = [Drain(own.deployment, other.coordinator)]
        return drain + self._drained(own.deployment)

    def _gives_way(self, own: CoordinatedPlan, other: CoordinatedPlan) -> bool:
        """Never both, and never neither once each knows what the other says of itself."""
        if own.deployment == other.deployment:  # a majority obeys the later one, and refuses the other everything
            later = (own.epoch, own.coordinator) < (other.epoch, other.coordinator)
            return later and self._is_left_for(own.deployment, other.coordinator)
        if own.serving != other.serving:
            return other.serving
        if bool(own.succeeds) != bool(other.succeeds):
            return bool(own.succeeds)  # what was begun anew gives way to what it was begun for
        return (own.epoch, own.coordinator) < (other.epoch, other.coordinator)

    def _is_left_for(self, deployment: DeploymentId, rival: DeviceId) -> bool:
        """Whether most devices of the last plan here that the rival was of obey it: its own word is not enough."""
        devices = self._plans_with.get(deployment, {}).get(rival, (self.me, rival))
        obeying = [one for one in devices if one == rival or self._obeyed.get(one, {}).get(deployment) == rival]
        return 2 * len(obeying) > len(devices)

    def _drained(self, deployment: DeploymentId) -> list[SuccessionAction]:
        to = self._yielding.get(deployment)
        if to is None or deployment in self._streaming or deployment not in self._own:
            return []
        begun_for = self._own[deployment].succeeds
        if begun_for in self._followed:
            self._followed[begun_for].anew = False
        del self._yielding[deployment], self._own[deployment], self._plans_with[deployment]
        return [GiveWay(deployment, to)]
