"""A deployment that another device coordinates: whom this device obeys in it, and when it stands up to follow."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from peerllm.daemon.decide.succession.succession_events import (
    AskVotes,
    CoordinatedPlan,
    SeekService,
    ServeAnew,
    SuccessionAction,
    TakeOver,
    VoteAsked,
    VoteCame,
)
from peerllm.types import DeviceId

GONE_S = 1.0  # a coordinator whose process ended may be back at once: a restart takes less than what follows
SILENT_S = 3.0  # a silent coordinator is waited for this long; its own devices go on without it no sooner
TURN_S = 1.5  # each further device in the plan's order waits this much longer
VOTE_S = 2.0  # votes that have not come by then count as refused; the next term begins a turn later
BOUND_S = 5.0  # a vote binds for so long, unless its candidate takes over
ANEW_S = 6.0  # without a majority in sight for so long the model is served as a new deployment
AGAIN_S = 10.0  # after which it is looked again whether the devices that are here can hold the model
EPOCHS_OF_TERM = 2000  # more than a coordinator uses up that nobody obeys; one that restarts skips a thousand


@dataclass(slots=True)
class Candidacy:
    """This device's attempt to follow."""

    term: int
    until: float
    votes: set[DeviceId] = field(default_factory=set)


@dataclass(slots=True)
class FollowedDeployment:
    """What device `me` knows of it. `online` are the other devices that are heard."""

    me: DeviceId
    plan: CoordinatedPlan
    lost_at: float | None = None  # since when its coordinator is not heard
    gone: bool = False  # the coordinator's process ended; else it is only silent
    voted_at: float | None = None  # when this device voted for the coordinator, which has not told of a plan since
    former: CoordinatedPlan | None = None  # which this device obeys again if that was in vain ...
    former_over: bool = False  # ... unless its coordinator has said since that it is over
    term: int = 0  # the last one that this device voted in, for itself or another
    due: float | None = None  # when this device's turn comes
    seeking: bool = False  # it is being found out whether the devices that are here can hold the model
    candidacy: Candidacy | None = None
    anew: bool = False  # served as a new deployment already

    @property
    def deadline(self) -> float | None:
        """When `vote_ended` and `turn` are wanted next."""
        bound = self.voted_at + BOUND_S if self.voted_at is not None and self.former is not None else None
        times = [self.due, None if self.candidacy is None else self.candidacy.until, bound]
        return min((one for one in times if one is not None), default=None)

    # ---- its coordinator ------------------------------------------------------------------------------------------

    def told(self, plan: CoordinatedPlan) -> bool:
        """A device says that it coordinates it. Whether this one believes that, or obeys another."""
        if plan.coordinator == self.plan.coordinator or self.lost_at is not None:
            self.obey(plan)
            return True
        if self.voted_at is not None:
            self.former, self.former_over = plan, False
        self.heard()
        return False

    def obey(self, plan: CoordinatedPlan) -> None:
        """Its coordinator, from now on."""
        self.plan, self.voted_at, self.former = plan, None, None
        self.heard()

    def vote_ended(self, now: float) -> bool:
        """Whether the candidate should have taken over by now: then this device obeys whom it obeyed before."""
        if self.voted_at is None or self.former is None or now < self.voted_at + BOUND_S:
            return False
        self.obey(self.former)
        return True

    def heard(self) -> None:
        """The coordinator is there."""
        self.lost_at = self.due = self.candidacy = None
        self.gone = self.anew = False

    def lose(self, gone: bool, equipped: bool, now: float) -> None:
        """The coordinator is silent, or gone."""
        self.lost_at, self.gone = now if self.lost_at is None else self.lost_at, gone
        self.set_turn(equipped, now)

    def set_turn(self, equipped: bool, now: float) -> None:
        """When this device stands up, if nobody before it does; `equipped`: it has all that a source needs."""
        if self.lost_at is None or not equipped or self.seeking or self.candidacy is not None or self.anew:
            self.due = None
            return
        self.due = max(now, self.lost_at + (GONE_S if self.gone else SILENT_S) + self._place * TURN_S)

    @property
    def _place(self) -> int:
        """This device's place among those that may follow, from 0."""
        followers = [device for device in self.plan.devices if device != self.plan.coordinator]
        return followers.index(self.me) if self.me in followers else len(followers)

    # ---- following it ---------------------------------------------------------------------------------------------

    def turn(self, served: bool, online: Collection[DeviceId], now: float) -> list[SuccessionAction]:
        """`deadline` has come. `served`: this device coordinates it itself, or what it began anew for it."""
        if served:
            self.due = self.candidacy = None
            return []
        if self.candidacy is not None and self.candidacy.until <= now:
            self.candidacy = None
            self.due = now + TURN_S * (1 + self._place)  # candidates of one instant part here
        if self.due is None or self.due > now or self.lost_at is None:
            return []
        self.due = None
        voters = self._voters(online)
        majority = self._majority(1 + len(voters))
        if self._waits(majority, now):
            return []
        if majority and self.gone:  # it has left its answers to this device, where they wait for memory if need be
            return self._ask_votes(voters, now)
        self.seeking = True
        return [SeekService(self.plan.deployment)]

    def _waits(self, majority: bool, now: float) -> bool:
        """Whether others may be seen yet that make a majority."""
        assert self.lost_at is not None
        if majority or now >= self.lost_at + ANEW_S:
            return False
        self.due = self.lost_at + ANEW_S
        return True

    def sought(self, feasible: bool, online: Collection[DeviceId], now: float) -> list[SuccessionAction]:
        """Whether the devices that are here can hold the model. Else a silent coordinator is waited for."""
        self.seeking = False
        if self.lost_at is None or self.candidacy is not None:
            return []
        voters = self._voters(online)
        majority = self._majority(1 + len(voters))
        if self._waits(majority, now):
            return []
        if majority and (feasible or self.gone):
            return self._ask_votes(voters, now)
        if not feasible:
            self.due = now + AGAIN_S
            return []
        self.anew = True
        return [ServeAnew(self.plan.deployment)]

    def _ask_votes(self, voters: tuple[DeviceId, ...], now: float) -> list[SuccessionAction]:
        self.term += 1
        self.candidacy = Candidacy(self.term, now + VOTE_S, {self.me})
        return [AskVotes(self.plan, self.term, voters)]

    def counted(self, came: VoteCame) -> TakeOver | None:
        """A vote came, or a refusal; with enough of them this device takes over."""
        if self.candidacy is None or self.candidacy.term != came.term:
            return None
        if came.granted and came.voter in self.plan.devices:
            self.candidacy.votes.add(came.voter)
        if not self._majority(len(self.candidacy.votes)):
            return None
        return TakeOver(self.plan.deployment, self.plan.epoch + EPOCHS_OF_TERM * came.term)

    def _voters(self, online: Collection[DeviceId]) -> tuple[DeviceId, ...]:
        return tuple(device for device in self.plan.devices if device != self.me and device in online)

    def _majority(self, count: int) -> bool:
        return self.me in self.plan.devices and 2 * count > len(self.plan.devices)

    # ---- letting another follow -----------------------------------------------------------------------------------

    def against(self, asked: VoteAsked) -> str:
        """Why this device does not vote for the candidate; "": it does."""
        if self.lost_at is None and self.voted_at is None:
            return "its coordinator is heard here"
        if asked.candidate not in self.plan.devices:
            return "the candidate is not of its plan"
        if asked.plan.epoch < self.plan.epoch:
            return f"epoch {self.plan.epoch} is known here"
        return "the vote of this term is given" if asked.term <= self.term else ""

    def vote(self, asked: VoteAsked, now: float) -> None:
        """Obey the candidate from now on."""
        if self.plan.coordinator != asked.candidate and self.voted_at is None:
            self.former, self.former_over = self.plan, False
        self.term, self.voted_at = asked.term, now
        self.plan = replace(self.plan, coordinator=asked.candidate, epoch=asked.plan.epoch, serving=False)
        self.heard()
