"""The household that a history happens to: devices, paths, what the source hears of them, and the answers it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

from peerllm.daemon.decide.deployment_life import deployment_events as on
from peerllm.daemon.decide.succession.succession_events import CoordinatedPlan
from tests.daemon.simulation.coordinating_device import CoordinatingDevice
from tests.daemon.simulation.model_coordinator import ModelCoordinator
from tests.daemon.simulation.model_engine import ModelFrame, Ring, reference
from tests.daemon.simulation.model_successor import ModelSuccessor
from tests.daemon.simulation.model_worker import DEPLOYMENT, ModelWorker, Reply
from tests.daemon.simulation.virtual_time import Machine, Paths, VirtualTime

CONNECT_S = 2.0  # a data link that does not come about by then does not
NUMBERS_APART = 1000  # of the sequences of two coordinators
DOUBLED = 0.02  # share of frames that arrive a second time, late


@dataclass
class ModelAnswer:
    """What a client waits for: `ids` is what it has seen."""

    number: int
    prompt: tuple[int, ...]
    expected: list[int]
    seed: int
    ids: list[int] = field(default_factory=list)
    taken: bool = False  # by a coordinator
    cancelled: bool = False
    moved: bool = False  # to what was begun anew

    @property
    def done(self) -> bool:
        return self.cancelled or self.moved or len(self.ids) == len(self.expected)


class SimulatedHousehold:
    """`succession`: every device may coordinate; else the first does whatever happens, as it never dies."""

    deployment = DEPLOYMENT

    def __init__(
        self, random: Random, layers: int, lent: list[int], recurrent: bool, real_membership: bool, succession: bool
    ) -> None:
        self.random, self.layers, self.recurrent = random, layers, recurrent
        self.time = VirtualTime()
        names = [f"{number:08x}" for number in range(len(lent))]
        self.source_name = names[0]
        self.machines = {name: Machine(name) for name in names}
        self.paths = Paths(self.time, random, self.machines)
        self.lent = dict(zip(names, lent, strict=True))
        self.workers = {name: self._worker(name) for name in names}
        self.leaving: set[str] = set()
        self._links: dict[tuple[int, str, str], int] = {}  # epoch, from, to: the breaks before it was made
        self.answers: list[ModelAnswer] = []
        self.story: list[str] = []
        self._numbers = count(0, NUMBERS_APART)
        able = names if succession else names[:1]
        self.sides = {name: CoordinatingDevice(self, name, real_membership) for name in able}
        self.successors = {name: ModelSuccessor(self, side) for name, side in self.sides.items() if succession}
        self.remembered: dict[str, tuple[int, tuple[str, ...]]] = {}  # who served in which epoch, and with whom
        self.served = False  # at any time
        self._claimed: dict[int, str] = {}  # epochs, and whose they are
        self._votes: dict[tuple[str, int, int, int], str] = {}  # voter, its life, epoch and term: for whom

    def start(self) -> None:
        for side in self.sides.values():
            side.sight.start()
        self.sides[self.source_name].begin()

    @property
    def coordinator(self) -> ModelCoordinator:
        """The first device's."""
        found = self.sides[self.source_name].coordinator
        assert found is not None
        return found

    # ---- devices --------------------------------------------------------------------------------------------------

    def _worker(self, name: str) -> ModelWorker:
        life = self.machines[name].born
        worker: ModelWorker

        def told(what: str, epoch: int) -> None:
            if self.machines[name].born != life:
                return
            if what == "engine":
                self._engine_gone(name, epoch)
            elif what == "unloaded":
                for other in self.machines if self.successors else ():
                    if other != name and self.paths.open(name, other):
                        self._link_lost(other, name, epoch)
            else:
                self._tell(name, lambda side: self._ready(side, name))

        worker = ModelWorker(
            name, self.lent[name], self.recurrent, self.time, self.random,
            lambda ring, stage, frame: self.forward(name, worker, ring, stage, frame), told,
        )  # fmt: skip
        return worker

    def _tell(self, name: str, call: Callable[[CoordinatingDevice], None]) -> None:
        """A device tells the coordinator that it obeys."""
        obeyed = self.successors[name].decider.coordinators.get(DEPLOYMENT) if self.successors else self.source_name
        if obeyed is not None:
            side = self.sides[obeyed]
            side.control(name, obeyed, lambda: call(side))

    def kill(self, name: str) -> None:
        """The daemon and its engine die; a connection that is not cut breaks at once."""
        self.machines[name].die()
        if name in self.sides:
            self.sides[name].end()
        self._break_links(name)
        self.look(name)

    def restart(self, name: str) -> None:
        machine = self.machines[name]
        if machine.alive:
            return
        machine.alive, machine.born = True, machine.born + 1
        for other in self.machines:
            if other != name:
                self.paths.reset(name, other)
        self.workers[name] = self._worker(name)
        if self.successors:
            anew, devices = self.successors[name].anew, self.successors[name].anew_devices
            side = self.sides[name] = CoordinatingDevice(self, name, real_membership=False)
            self.successors[name] = ModelSuccessor(self, side)
            self.successors[name].anew, self.successors[name].anew_devices = anew, devices
            side.sight.start()
            if name in self.remembered:
                self.successors[name].come_back(*self.remembered[name])
            self.successors[name].look()
        self.look(name)

    def crash_engine(self, name: str) -> None:
        if self.machines[name].alive:
            self.workers[name].crash_engine()

    def _ready(self, side: CoordinatingDevice, name: str) -> None:
        """Its engine runs again."""
        if name == side.source_name or side.sight.condition(name) == "online":
            side.become(name, "online")

    def _engine_gone(self, name: str, epoch: int) -> None:
        self._tell(name, lambda side: side.engine_gone(name, epoch))
        self._break_links(name)

    # ---- data links -----------------------------------------------------------------------------------------------

    def connect(self, name: str, epoch: int, ring: Ring, then: Callable[[], None], fail: Reply) -> None:
        """A device dials the stages after its own."""
        after = {ring[(n + 1) % len(ring)][0] for n, (device, _, _) in enumerate(ring) if device == name} - {name}

        def reached() -> bool:
            return all(self.paths.open(name, to) and self.answers_now(to) for to in after)

        def dial() -> None:
            if reached():
                for to in after:
                    self._links[epoch, name, to] = self.paths.resets(name, to)
                then()
            else:
                fail("nobody answers")

        self.time.after(0.0 if reached() else CONNECT_S, lambda: self.machines[name].do(dial))

    def answers_now(self, name: str) -> bool:
        return self.machines[name].alive and not self.machines[name].frozen

    def forward(self, name: str, worker: ModelWorker, ring: Ring, stage: int, frame: ModelFrame) -> None:
        if self.workers[name] is not worker:
            return  # an earlier life's
        to = ring[stage][0] if stage < len(ring) else ring[0][0]
        back = frame.kind == "replay" and stage == len(ring)  # which may go back over a link that comes from there
        if to != name and not back and self._links.get((frame.epoch, name, to)) != self.paths.resets(name, to):
            return  # the link broke

        def arrive() -> None:
            if stage == len(ring):
                self.sides[to].source.hear(frame)
            elif (engine := self.workers[to].engine) is not None:
                engine.hear(stage, frame)

        self.paths.send(name, to, arrive, f"data {frame.epoch}")
        if self.random.random() < DOUBLED:
            self.paths.send(name, to, arrive, f"late {self.random.random()}", later_s=self.random.uniform(0.1, 3.0))

    def _break_links(self, name: str) -> None:
        """Whoever has a data link with it notices, if the path is open."""
        for other in self.machines:
            if other != name and self.paths.open(name, other):
                self._link_lost(other, name)

    def _link_lost(self, name: str, to: str, only: int | None = None) -> None:
        engine = self.workers[name].engine
        for epoch, ring in list(engine.rings.items()) if engine is not None and self.machines[name].alive else []:
            if only not in (None, epoch):
                continue
            order = [device for device, _, _ in ring]
            pairs = {frozenset((a, b)) for a, b in zip(order, [*order[1:], order[0]], strict=True)}
            if frozenset((name, to)) in pairs:
                event = on.LinksLost(name, epoch, f"{name} lost its link to {to}", to)
                self._tell(name, lambda side, event=event: side.coordinator and side.coordinator.feed(event))

    def reset(self, a: str, b: str) -> None:
        """All connections between two devices break."""
        self.paths.reset(a, b)
        self._link_lost(a, b)
        self._link_lost(b, a)
        for name in (a, b):
            self.look(name)

    # ---- what devices hear ----------------------------------------------------------------------------------------

    def look(self, name: str) -> None:
        """Something changed that decides who hears the device, and whom it hears."""
        for side in self.sides.values():
            side.look(name)
        if self.successors:
            for other in self.machines:
                self.sides[name].look(other)

    def heard(self, side: CoordinatingDevice, name: str, condition: on.DeviceCondition, renewed: bool) -> None:
        if self.successors:
            self.successors[side.source_name].presence(name, condition, renewed)

    def leave(self, name: str, leaving: bool) -> None:
        (self.leaving.add if leaving else self.leaving.discard)(name)
        for side in self.sides.values():
            if name != side.source_name and side.sight.condition(name) == "online":
                side.become(name, "online")

    # ---- coordinators ---------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        return next(self._numbers)

    def claim(self, epoch: int, coordinator: str) -> None:
        assert self._claimed.setdefault(epoch, coordinator) == coordinator, f"two coordinators use epoch {epoch}"

    @property
    def coordinators(self) -> list[str]:
        """Those that live."""
        return [name for name, side in self.sides.items() if side.coordinator is not None]

    def plan_changed(self, side: CoordinatingDevice) -> None:
        coordinator = side.coordinator
        if self.successors and coordinator is not None:
            if coordinator.serving and coordinator.running is not None:
                self.served = True
                _, before = self.remembered.get(side.source_name, (0, ()))
                devices = (*before, *(device for device, _, _ in coordinator.told_ring))
                self.remembered[side.source_name] = coordinator.running, tuple(dict.fromkeys(devices))
            if side.draining and not coordinator.serving:
                side.wanted.clear()  # whoever goes on with the deployment goes on with them
            self.successors[side.source_name].look()
            streaming = any(not self.answers[number].done for number in side.wanted)
            self.successors[side.source_name].streams(streaming)

    def vote(self, voter: str, plan: CoordinatedPlan, term: int, candidate: str) -> None:
        """A vote is given."""
        key = voter, self.machines[voter].born, plan.epoch, term
        assert self._votes.setdefault(key, candidate) == candidate, f"{voter} votes twice in term {term}"

    def check_votes(self, candidate: str, plan: CoordinatedPlan, term: int) -> None:
        """A candidate takes over."""
        given = {key[0] for key, to in self._votes.items() if key[2:] == (plan.epoch, term) and to == candidate}
        votes = given & set(plan.devices)
        assert 2 * len(votes) > len(plan.devices), f"{candidate} takes over with {len(votes)} of {len(plan.devices)}"

    def check_one_left(self) -> None:
        """After all that happened one device coordinates, which all obey and which serves.

        But one that never heard that another had a part in the deployment does not believe it, and is not asked here.
        """
        sides = [self.sides[name] for name in self.coordinators]
        left = [*self.coordinators, *(name for name, one in self.successors.items() if one.anew)]
        if any(a != b and not self.successors[a].knows(b) for a in left for b in left):
            return
        assert len(left) == 1, f"{left} coordinate"
        for side in sides:
            obeyed = {one.decider.coordinators.get(DEPLOYMENT) for one in self.successors.values()}
            assert obeyed == {side.source_name}, f"{obeyed} are obeyed"
            assert side.coordinator is not None and side.coordinator.serving, "it does not serve again"
            assert all(self.answers[number].done for number in side.wanted), "an answer does not end"

    # ---- answers --------------------------------------------------------------------------------------------------

    def ask(self, prompt: tuple[int, ...], seed: int, tokens: int) -> None:
        self.answers.append(ModelAnswer(len(self.answers), prompt, reference(self.layers, prompt, seed, tokens), seed))
        for side in self.sides.values():
            side.admit()

    def route(self, side: CoordinatingDevice) -> None:
        """A coordinator that serves takes the answers that no other has taken."""
        for answer in self.answers:
            if not answer.taken:
                answer.taken = True
                side.wanted[answer.number] = []

    def token_came(self, side: CoordinatingDevice, number: int) -> None:
        if self.successors:
            self.successors[side.source_name].copy(number)
            if self.answers[number].done:
                self.plan_changed(side)

    def cancel(self, number: int) -> None:
        if number < len(self.answers):
            self.answers[number].cancelled = True
            for side in self.sides.values():
                side.cancel(number)
