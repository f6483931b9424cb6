"""A model of the coordinator: the real decider, and what carries its actions out, over paths that may fail.

It checks what each action presupposes: epochs only grow, what is switched to stands, nothing in use is released.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from peerllm.daemon.decide.deployment_life import deployment_events as on
from peerllm.daemon.decide.deployment_life.deployment_decider import DeploymentDecider
from peerllm.types import Stage
from tests.daemon.simulation.model_engine import Ring
from tests.daemon.simulation.model_worker import LAYER_BYTES, ModelWorker, Reply

if TYPE_CHECKING:
    from tests.daemon.simulation.coordinating_device import CoordinatingDevice

RESERVE_S, ACTIVATE_S, RELEASE_S, CARRY_S, SWITCH_S = 5.0, 10.0, 30.0, 10.0, 10.0  # that an answer is waited for
ASSIGN_S = 120.0
# Actions, searches in vain and attempts that fail; without waits there are more.
MOST_ACTIONS, MOST_IN_VAIN, MOST_FAILED, RATE_S = 48, 14, 10, 5.0
AWAY = "it cannot be reached"

Question = Callable[[ModelWorker, Reply], None]


@dataclass
class ModelEpoch:
    ring: Ring
    state: str = "coming"  # then "stands", "failed" or "abandoned"
    asked: set[str] = field(default_factory=set)


class ModelCoordinator:
    def __init__(self, house: CoordinatingDevice, random: Random, decider: DeploymentDecider) -> None:
        self._house, self._random, self.me = house, random, house.source_name
        self.decider, self.over = decider, False
        self.conditions: dict[str, str] = {}  # as the decider was told
        self.plans: dict[int, tuple[Ring, bool]] = {}
        self.epochs: dict[int, ModelEpoch] = {}
        self.running: int | None = None
        self.serving = self.served = self.gave_up = False
        self.switching: int | None = None
        self.moves = self.waits = 0
        self._acted: deque[float] = deque(maxlen=MOST_ACTIONS)
        self._failed: deque[float] = deque(maxlen=MOST_FAILED)
        self._in_vain: deque[float] = deque(maxlen=MOST_IN_VAIN)
        self._pending: dict[str, list[Callable[[str], None]]] = {}
        self._deadlines = 0
        self.log: list[str] = []

    # ---- events in, actions out -----------------------------------------------------------------------------------

    def feed(self, event: on.DeploymentEvent) -> None:
        if self.gave_up or self.over:
            return
        now = self._house.time.now
        if isinstance(event, on.DeviceIs):
            self.conditions[event.device] = event.condition
        actions = self.decider.handle(event, now)
        if not isinstance(event, on.DeadlineReached) or actions:
            self.log.append(f"{now:8.3f} {event}")
        for action in actions:
            self.log.append(f"              -> {action}")
            self._acted.append(now)
            hasty = len(self._acted) == MOST_ACTIONS and now - self._acted[0] < RATE_S
            assert not hasty, f"{MOST_ACTIONS} actions in {RATE_S} s: it never rests"
            self._do(action)
        self._house.house.plan_changed(self._house)
        self._deadlines += 1
        number, due = self._deadlines, self.decider.deadline()
        if due is not None:
            assert due > now or not self.decider._rules.begun, f"the deadline {due} is over at {now}"
            self._house.time.at(due, lambda: self._house.machines[self.me].do(lambda: self._reached(number)))

    def _reached(self, number: int) -> None:
        if number == self._deadlines and not self.over:
            self.feed(on.DeadlineReached())

    def _do(self, action: on.DeploymentAction) -> None:
        match action:
            case on.MakePlan(number, without, compare):
                ring = self._plan(without, compare)
                delay = self._random.choice((0.01, 0.01, 0.05, 0.05, 0.05, 0.3, 1.5))
                self._later(delay, lambda: self._planned(number, ring, compare))
            case on.Establish(epoch, number, first_release):
                ring, beside = self.plans[number]
                self._begin(epoch, ring)
                if first_release:
                    assert not self.serving, "what sequences run on is let go of while it serves"
                    self.running = None
                    self._release_all(epoch - 1)
                else:
                    assert beside or self.running is None, "it was not told to make room"
                self._reserve(epoch, sorted({name for name, _, _ in ring}))
            case on.Renew(epoch):
                assert self.running is not None
                self._begin(epoch, self.epochs[self.running].ring)
                self._reserve(epoch, sorted({name for name, _, _ in self.epochs[epoch].ring}))
            case on.Abandon(epoch):
                assert self.epochs[epoch].state in ("coming", "stands")
                assert epoch != self.running, "the epoch that sequences run in is abandoned"
                self.epochs[epoch].state = "abandoned"
                self._undo(epoch)
            case on.CarryOver(epoch):
                assert self.epochs[epoch].state == "stands"
                assert self.running is not None
                self._house.carry(self.epochs[self.running].ring, epoch, self.epochs[epoch].ring)
                self._later(CARRY_S, lambda: self.feed(on.Carried(epoch)))
            case on.SwitchTo(epoch):
                self._switch(epoch)
            case on.ReleaseBefore(epoch):
                self._check_unused(epoch)
                if self.running is not None and self.running < epoch:
                    self.running = None
                self._release_all(epoch - 1)
            case on.BecomeServing():
                assert self.running is not None
                self.serving = self.served = True
                self._house.admit()
            case on.BecomeWaiting():
                self.serving = False
                self.waits += 1
            case on.GiveUp():
                assert not self.served, "it gives up though it has served"
                self.gave_up = True

    def _later(self, delay: float, call: Callable[[], None]) -> None:
        def then() -> None:
            if not self.over:
                call()

        self._house.time.after(delay, lambda: self._house.machines[self.me].do(then))

    # ---- asking devices -------------------------------------------------------------------------------------------

    def ask(self, name: str, question: Question, timeout_s: float, done: Callable[[str], None]) -> None:
        """`done` is called once, with "" or why not."""
        house = self._house
        settled = False

        def settle(reason: str) -> None:
            nonlocal settled
            if not settled and not self.over:
                settled = True
                done(reason)

        if not house.connected(name):
            self._later(0.0, lambda: settle(AWAY))
            return
        self._pending.setdefault(name, []).append(settle)

        def reply(reason: str) -> None:
            house.control(name, self.me, lambda: settle(reason))

        house.control(self.me, name, lambda: question(house.workers[name], reply))
        self._later(timeout_s, lambda: settle(AWAY))

    def lost(self, name: str) -> None:
        """The control connection broke: no answer will come over it."""
        for settle in self._pending.pop(name, []):
            self._later(0.0, lambda settle=settle: settle(AWAY))

    # ---- plans ----------------------------------------------------------------------------------------------------

    def could_serve(self) -> bool:
        """Whether there is a plan for the devices that are here."""
        return self._plan((), compare=True) is not None

    @property
    def told_ring(self) -> Ring:
        """The last plan that is told of; () before the first."""
        return self.epochs[self.running].ring if self.running is not None else ()

    def _plan(self, without: Iterable[str], compare: bool) -> Ring | None:
        """Any plan that fits what devices can lend now, as far as is known here; None if there is none."""
        house, random = self._house, self._random
        free = {}
        for name, worker in house.workers.items():
            if house.connected(name) and name not in without and house.usable(name):
                ours = sum(p.nbytes for p in worker.ledger.promises() if p.deployment != house.deployment)
                free[name] = (worker.ledger.lent_bytes - ours) // LAYER_BYTES
        if free.get(self.me, 0) < 1 or sum(free.values()) < house.layers:
            return None
        others = [name for name in free if name != self.me and free[name]]
        random.shuffle(others)
        if compare or random.random() < 0.5:  # as few devices as possible
            others.sort(key=lambda name: -free[name])
        ring: list[tuple[str, int, int]] = []
        first = 0
        rest = sum(free.values())
        for name in (self.me, *others):
            rest -= free[name]
            least = max(house.layers - first - rest, 1 if name == self.me else 0)
            most = min(free[name], house.layers - first)
            take = most if random.random() < 0.7 else random.randint(min(least, most), most)
            if take > 0:
                ring.append((name, first, first + take - 1))
                first += take
        return tuple(ring) if first == house.layers else None

    def _planned(self, number: int, ring: Ring | None, compare: bool) -> None:
        if ring is None:
            now = self._house.time.now
            self._in_vain.append(now)
            assert len(self._in_vain) < MOST_IN_VAIN or now - self._in_vain[0] > RATE_S, "it searches without a wait"
            self.feed(on.NoPlan(number, "too little memory", contended=self._random.random() < 0.3))
            return
        running = self.epochs[self.running].ring if self.running is not None else None
        stay = compare and (ring == running or self._random.random() < 0.3)
        stages = tuple(Stage(name, first, last) for name, first, last in ring)
        beside = self._beside(ring)
        self.plans[number] = ring, beside
        self.feed(on.PlanFound(number, stages, stay, beside, ""))

    def _beside(self, ring: Ring) -> bool:
        for name, first, last in ring:
            worker = self._house.workers[name]
            if worker.engine is None:
                continue
            new = set(range(first, last + 1)) - worker.engine.slots.keys()
            if len(new) * LAYER_BYTES > worker.ledger.free_bytes:
                return False
        return True

    # ---- epochs ---------------------------------------------------------------------------------------------------

    def _begin(self, epoch: int, ring: Ring) -> None:
        assert epoch > max(self.epochs, default=0), "epochs only grow"
        self._house.house.claim(epoch, self.me)
        self.epochs[epoch] = ModelEpoch(ring)

    def _reserve(self, epoch: int, devices: list[str]) -> None:
        known = self.epochs[epoch]
        if known.state != "coming":
            return
        if not devices:
            self._assign(epoch)
            return
        name, *others = devices
        own = {n for d, first, last in known.ring if d == name for n in range(first, last + 1)}
        known.asked.add(name)

        def question(worker: ModelWorker, reply: Reply) -> None:
            loaded = worker.engine.slots.keys() if worker.engine is not None else set()
            worker.reserve(self.me, epoch, len(own), len(own - loaded), reply)

        self._step(epoch, name, question, RESERVE_S, lambda: self._reserve(epoch, others))

    def _assign(self, epoch: int) -> None:
        known = self.epochs[epoch]
        waiting = set(known.asked)

        def done(name: str) -> None:
            waiting.discard(name)
            if not waiting:
                self._activate(epoch, sorted(known.asked))

        for name in sorted(known.asked):
            self._step(
                epoch, name, lambda worker, reply: worker.assign(self.me, epoch, known.ring, reply), ASSIGN_S,
                lambda name=name: done(name),
            )  # fmt: skip

    def _activate(self, epoch: int, devices: list[str]) -> None:
        if not devices:
            if self.epochs[epoch].state == "coming":
                self.epochs[epoch].state = "stands"
                self.feed(on.Established(epoch))
            return
        *others, name = devices

        def question(worker: ModelWorker, reply: Reply) -> None:
            self._house.connect(name, epoch, self.epochs[epoch].ring, lambda: worker.activate(epoch, reply), reply)

        self._step(epoch, name, question, ACTIVATE_S, lambda: self._activate(epoch, others))

    def _step(self, epoch: int, name: str, question: Question, timeout_s: float, then: Callable[[], None]) -> None:
        def done(reason: str) -> None:
            if self.epochs[epoch].state != "coming":
                return
            if not reason:
                then()
                return
            self.epochs[epoch].state = "failed"
            self._undo(epoch)
            now = self._house.time.now
            self._failed.append(now)
            assert len(self._failed) < MOST_FAILED or now - self._failed[0] > RATE_S, "it tries without a wait"
            past = "ask with a later one" in reason
            blamed = None if past or "are free" in reason else name
            self.feed(on.NotEstablished(epoch, blamed, reason, past=past))

        self.ask(name, question, timeout_s, done)

    def _undo(self, epoch: int) -> None:
        for name in sorted(self.epochs[epoch].asked):
            self.ask(name, lambda w, reply: w.release(self.me, epoch, True, reply), RELEASE_S, lambda _: None)

    def _release_all(self, epoch: int) -> None:
        for name in self._house.workers:
            self.ask(name, lambda w, reply: w.release(self.me, epoch, False, reply), RELEASE_S, lambda _: None)

    def _check_unused(self, epoch: int) -> None:
        assert not self.serving or self.switching is None, "it lets go of epochs before all sequences have changed"
        for running in self._house.source.sequences.values():
            assert not self.serving or running.epoch >= epoch, f"epoch {running.epoch} is released, and still used"

    # ---- switching ------------------------------------------------------------------------------------------------

    def _switch(self, epoch: int) -> None:
        assert self.epochs[epoch].state == "stands", "it switches to an epoch that does not stand"
        assert self.running is None or epoch > self.running
        self.running = self.switching = epoch
        self.moves += 1

        def done(reason: str = "") -> None:
            if self.switching == epoch:
                self.switching = None
                self.feed(on.Switched(epoch, reason))

        self._house.switch(epoch, lambda: self._later(0.001, done))
        self._later(SWITCH_S, lambda: done("sequences did not change in time"))

    def engine_lost(self, name: str, epoch: int) -> None:
        if name == self.me and self.switching is not None:
            switching, self.switching = self.switching, None
            self.feed(on.Switched(switching, "the engine ended"))
        self.feed(on.EngineLost(name, epoch, f"{name}: its engine ended"))
