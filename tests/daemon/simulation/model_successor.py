"""A model of a device's part in succession: the real decider, and what carries its actions out.

It checks what they presuppose: a strict majority of votes, one vote of each in a term, a coordinator that is not heard
for long enough, and epochs that nobody used before. What is begun anew is not computed: only that it is served counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from peerllm.daemon.control_messages import Reserve
from peerllm.daemon.decide.deployment_life.deployment_decider import DeploymentDecider
from peerllm.daemon.decide.deployment_life.deployment_events import DeviceCondition
from peerllm.daemon.decide.succession import succession_events as by
from peerllm.daemon.decide.succession.succession_decider import Succession
from peerllm.errors import RefusedError
from tests.daemon.simulation.coordinating_device import CoordinatingDevice
from tests.daemon.simulation.model_coordinator import ModelCoordinator
from tests.daemon.simulation.model_worker import DEPLOYMENT, LAYER_BYTES

if TYPE_CHECKING:
    from tests.daemon.simulation.household import SimulatedHousehold

FOLLOWERS = 2
EQUIP_S = 1.0  # until a follower has what only the source had
SEEK_S = 0.05
RETURN_S = 2.0  # in which a device that starts hears who goes on with what it served
COPIED = 0.3  # share of the tokens after which the answer is copied to the successor
# The least that a coordinator is not heard before votes are asked for; not the decider's own constants.
LEAST_S = {"gone": 0.9, "silent": 2.9}
EPOCHS_AHEAD = 1000


class ModelSuccessor:
    def __init__(self, house: SimulatedHousehold, side: CoordinatingDevice) -> None:
        self._house, self._side, self.me = house, side, side.source_name
        self.decider = Succession(self.me)
        self.copies: dict[int, list[int]] = {}
        self.ready: set[str] = set()  # who could follow this device
        self.anew, self.anew_devices = False, tuple[str, ...]()  # the deployment is served as a new one
        self._devices: tuple[str, ...] = ()  # of the last plan
        self._need: tuple[str, tuple[str, ...]] | None = None
        self._told: dict[str, set[str]] = {}
        self._views: tuple[by.CoordinatedPlan, ...] = ()
        self._lost_at: dict[str, float] = {}
        self._obeyed: dict[str, str] = {}
        self._stays, self._draining = set[str](), set[str]()
        self._turns = 0
        self._streaming = False
        self._last: tuple[str, ...] = ()  # the devices of the last plan that was told of
        self._asked: tuple[by.CoordinatedPlan, int] | None = None  # for votes

    # ---- what happens ---------------------------------------------------------------------------------------------

    def presence(self, name: str, condition: DeviceCondition, renewed: bool) -> None:
        if condition in ("online", "leaving"):
            self._lost_at.pop(name, None)
            self.feed(by.PresenceChanged(name, "online", renewed))
            if renewed:
                self._tell(name)
        else:
            self._lost_at.setdefault(name, self._side.time.now)
            self.feed(by.PresenceChanged(name, "silent" if condition == "silent" else "gone"))
        self.told(self.me, self._seen())

    def look(self) -> None:
        """What this device coordinates may have changed: everyone hears of it."""
        views, obeyed = self._seen(), dict(self.decider.obeyed)
        if views != self._views or obeyed != self._obeyed:
            self._views, self._obeyed = views, obeyed
            self.told(self.me, views)
            for name in self._side.machines:
                if name != self.me:
                    self._tell(name)

    def told(self, device: str, views: tuple[by.CoordinatedPlan, ...], obeyed: Mapping[str, str] | None = None) -> None:
        before, now = self._told.get(device, set()), {view.deployment for view in views}
        self._told[device] = now
        for over in sorted(before - now):
            self.feed(by.DeploymentOver(over, device))
        for view in views:
            if view.deployment == DEPLOYMENT and view.devices:
                self._last = view.devices
            self.feed(by.PlanTold(view if view.devices else replace(view, devices=self._last)))
        if obeyed is not None:
            self.feed(by.ObeyedTold(device, obeyed))
        if dict(self.decider.obeyed) != self._obeyed:
            self._side.at_source(0.0, self.look)
        self._equip()

    def knows(self, name: str) -> bool:
        """Whether the device had a part in the deployment, and most of its devices follow it, as this one heard."""
        own, both = self.decider._own, self._house.coordinators
        part = name in own._took_part.get(DEPLOYMENT, ())
        if not part or self.me not in both or name not in both or DEPLOYMENT not in own.plans:
            return part
        epochs = [self._house.successors[one].told_epoch for one in (self.me, name)]
        return epochs[0] > epochs[1] or own._is_left_for(DEPLOYMENT, name)

    @property
    def told_epoch(self) -> int:
        return max((view.epoch for view in self._views if view.deployment == DEPLOYMENT), default=0)

    def streams(self, streaming: bool) -> None:
        """Whether answers are being streamed by this device's deployment."""
        if streaming != self._streaming:
            self._streaming = streaming
            self.feed(by.StreamsChanged(DEPLOYMENT, streaming))

    def copied(self, device: str, number: int, ids: list[int]) -> None:
        if self.decider.coordinators.get(DEPLOYMENT) == device:
            self.copies[number] = ids

    def come_back(self, epoch: int, devices: tuple[str, ...]) -> None:
        """This device coordinated when it stopped: it does again, unless another goes on with it."""
        self._devices = devices

        def begin() -> None:
            others = [one for one, told in self._told.items() if one != self.me and told]
            if not others and self._side.coordinator is None:
                self._side.begin(epoch + EPOCHS_AHEAD, lasting=True)
                self.look()
            elif others:
                self._house.remembered.pop(self.me, None)

        self._side.at_source(RETURN_S, begin)

    def _tell(self, name: str) -> None:
        views, obeyed, other = self._views, self._obeyed, self._house
        self._side.control(self.me, name, lambda: other.successors[name].told(self.me, views, obeyed))

    def _seen(self) -> tuple[by.CoordinatedPlan, ...]:
        views, coordinator = [], self._side.coordinator
        if coordinator is not None:
            ring, running = coordinator.told_ring, coordinator.running
            self._devices = tuple(dict.fromkeys(device for device, _, _ in ring)) or self._devices
            serving, epoch = (
                coordinator.serving and not self._side.draining,
                running or max(coordinator.epochs, default=0),
            )
            stays = DEPLOYMENT in self._stays
            views.append(by.CoordinatedPlan(DEPLOYMENT, self.me, self._devices, epoch, serving, stays=stays))
        if (anew := f"anew {self.me}") and self.anew:
            serving, stays = anew not in self._draining, anew in self._stays
            views.append(by.CoordinatedPlan(anew, self.me, self.anew_devices, 1, serving, DEPLOYMENT, stays))
        return tuple(views)

    # ---- events in, actions out -----------------------------------------------------------------------------------

    def feed(self, event: by.SuccessionEvent) -> list[by.SuccessionAction]:
        actions = self.decider.handle(event, self._side.time.now)
        ledger = self._side.workers[self.me].ledger
        for deployment, coordinator in self.decider.coordinators.items():
            ledger.hand_over(deployment, coordinator)
        for action in actions:
            self._house.story.append(f"{self._side.time.now:8.3f} {self.me}: {event} -> {action}")
            self._do(action)
        if dict(self.decider.obeyed) != self._obeyed:
            self._side.at_source(0.0, self.look)
        self._turns += 1
        number, due = self._turns, self.decider.deadline()
        if due is not None:
            self._side.at_source(max(0.001, due - self._side.time.now), lambda: self._turn(number))
        return actions

    def _turn(self, number: int) -> None:
        if number == self._turns:
            self.feed(by.TurnCame())

    def _do(self, action: by.SuccessionAction) -> None:
        match action:
            case by.SeekService():
                self._side.at_source(SEEK_S, lambda: self.feed(by.ServiceSought(DEPLOYMENT, self._could_serve())))
            case by.AskVotes(plan, term, devices):
                self._check_lost(plan)
                self._asked = plan, term
                self._house.vote(self.me, plan, term, self.me)
                for device in devices:
                    self._ask(device, plan, term)
            case by.TakeOver(_, epoch):
                assert self._asked is not None
                self._house.check_votes(self.me, *self._asked)
                self._take_over(epoch)
            case by.ServeAnew():
                assert self._could_serve(), "a model is served anew that the devices here cannot hold"
                self._serve_anew()
            case by.Stay(deployment):
                self._stays.add(deployment)
                self._side.at_source(0.0, self.look)
            case by.Drain(deployment):
                self._draining.add(deployment)
                self._side.draining |= deployment == DEPLOYMENT
                self._side.at_source(0.0, lambda: self._house.plan_changed(self._side))
                self._side.at_source(0.0, self.look)
            case by.DrainNoMore(deployment):
                self._draining.discard(deployment)
                self._side.draining &= deployment != DEPLOYMENT
                self._side.at_source(0.0, self._side.admit)
                self._side.at_source(0.0, self.look)
            case by.GiveWay(deployment):
                self._give_way(deployment)
            case by.Obey() | by.Refuse():
                pass

    def _could_serve(self) -> bool:
        idle = DeploymentDecider(self.me, lasting=True, epoch=0)
        return ModelCoordinator(self._side, self._side.random, idle).could_serve()

    def _check_lost(self, plan: by.CoordinatedPlan) -> None:
        """Votes are asked for where the coordinator is not heard, and has not been for a while."""
        condition = self._side.sight.condition(plan.coordinator)
        assert condition != "online", "votes are asked for though the coordinator is heard"
        silent_s = self._side.time.now - self._lost_at[plan.coordinator]
        assert silent_s >= LEAST_S[condition], f"a coordinator that is {condition} is waited for {silent_s:.1f} s"
        assert condition == "gone" or self._could_serve(), "a silent coordinator is followed by who cannot serve"

    def _ask(self, device: str, plan: by.CoordinatedPlan, term: int) -> None:
        def question() -> None:
            other = self._house.successors[device]
            (answer,) = other.feed(by.VoteAsked(self.me, plan, term))
            granted = isinstance(answer, by.Obey)
            if granted:
                self._house.vote(device, plan, term, self.me)
            other._side.control(device, self.me, lambda: came(granted))

        def came(granted: bool) -> None:
            self.feed(by.VoteCame(device, DEPLOYMENT, term, granted))

        self._side.control(self.me, device, question)

    def _take_over(self, epoch: int) -> None:
        self._house.remembered[self.me] = epoch, self._asked[0].devices if self._asked is not None else ()
        self._side.begin(epoch, lasting=True)
        self._side.wanted.update({number: list(ids) for number, ids in self.copies.items()})
        self.copies.clear()
        self._side.at_source(0.0, self.look)

    def _serve_anew(self) -> None:
        worker, layers = self._side.workers[self.me], self._side.layers
        self._drop()
        ledger, name = worker.ledger, f"anew {self.me}"
        try:
            ledger.reserve(Reserve(name, 1, min(ledger.free_bytes, layers * LAYER_BYTES), 600.0), self.me, 0.0)
            ledger.commit(name, 1, self.me, 0.0)
        except RefusedError:
            pass  # its owner pauses it just now
        self.anew, self.anew_devices = True, self.decider.followed[DEPLOYMENT].devices
        for number in self.copies:
            self._house.answers[number].moved = True
        self._side.at_source(0.0, self.look)

    def _give_way(self, deployment: str) -> None:
        self._stays.discard(deployment)
        self._draining.discard(deployment)
        ledger = self._side.workers[self.me].ledger
        if deployment == DEPLOYMENT:
            self._side.end()
            self._house.remembered.pop(self.me, None)
            self._drop()
        else:
            self.anew = False
            ledger.release(deployment, 1, self.me)
        self._side.at_source(0.0, self.look)

    def _drop(self) -> None:
        """Let go of what is loaded of the deployment; everyone hears of it."""
        self._side.workers[self.me].drop()
        for side in self._house.sides.values():
            if side is not self._side:
                side.hear_holdings(self.me)

    # ---- followers ------------------------------------------------------------------------------------------------

    def _equip(self) -> None:
        """The first devices after the coordinator have ready what only it holds."""
        plan = self.decider.followed.get(DEPLOYMENT)
        if plan is None or not plan.serving or not self._side.connected(plan.coordinator):
            return
        behind = [device for device in plan.devices if device != plan.coordinator][:FOLLOWERS]
        need = plan.coordinator, plan.devices
        if self.me not in behind or self._need == need:
            return
        self._need = need

        def equipped() -> None:
            if self._need == need and self._side.sight.condition(plan.coordinator) == "online":
                self.feed(by.Equipped(DEPLOYMENT))
                coordinator = self._house.successors[plan.coordinator]
                self._side.control(self.me, plan.coordinator, lambda: coordinator.ready.add(self.me))
            else:
                self._need = None

        self._side.at_source(EQUIP_S, equipped)

    def copy(self, number: int) -> None:
        """An answer has another token: some of them are told to who would go on."""
        if self._side.random.random() < COPIED:
            able = [d for d in self._devices if d in self.ready and self._side.sight.condition(d) == "online"]
            if able:
                ids, to = list(self._side.wanted[number]), self._house.successors
                self._side.control(self.me, able[0], lambda: to[able[0]].copied(self.me, number, ids))
