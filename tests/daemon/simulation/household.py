"""The household that a history happens to: devices, paths, what the source hears of them, and the answers it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from peerllm.daemon.decide.deployment_life import deployment_events as on
from peerllm.daemon.decide.membership import GRACE_S
from peerllm.types import DeviceId
from tests.daemon.simulation.model_coordinator import ModelCoordinator
from tests.daemon.simulation.model_engine import ModelFrame, Ring, reference
from tests.daemon.simulation.model_source import ModelSource
from tests.daemon.simulation.model_worker import DEPLOYMENT, ModelWorker, Reply
from tests.daemon.simulation.sight import MembershipSight, PlainSight, Sight
from tests.daemon.simulation.virtual_time import Machine, Paths, VirtualTime

CONNECT_S = 2.0  # a data link that does not come about by then does not
SLOTS = 3
DOUBLED = 0.02  # share of frames that arrive a second time, late


@dataclass
class ModelAnswer:
    """What a client waits for: `ids` is what it has seen."""

    number: int
    prompt: tuple[int, ...]
    seed: int
    expected: list[int]
    ids: list[int] = field(default_factory=list)
    slot: int = -1
    cancelled: bool = False

    @property
    def done(self) -> bool:
        return self.cancelled or len(self.ids) == len(self.expected)


class SimulatedHousehold:
    deployment = DEPLOYMENT

    def __init__(self, random: Random, layers: int, lent: list[int], recurrent: bool, real_membership: bool) -> None:
        self.random, self.layers, self.recurrent = random, layers, recurrent
        self.time = VirtualTime()
        names = [f"{number:08x}" for number in range(len(lent))]
        self.source_name = names[0]
        self.machines = {name: Machine(name) for name in names}
        self.paths = Paths(self.time, random, self.machines)
        self.lent = dict(zip(names, lent, strict=True))
        self.workers = {name: self._worker(name) for name in names}
        self.source = self._source()
        self.leaving: set[str] = set()
        self._links: dict[tuple[int, str, str], int] = {}  # epoch, from, to: the breaks before it was made
        self.answers: list[ModelAnswer] = []
        self.coordinator = ModelCoordinator(self, random)
        self.sight: Sight = MembershipSight(self) if real_membership else PlainSight(self)

    def start(self) -> None:
        self.coordinator.feed(on.DeviceIs(self.source_name, "online"))
        self.sight.start()
        self.coordinator.feed(on.Asked())

    # ---- devices --------------------------------------------------------------------------------------------------

    def _worker(self, name: str) -> ModelWorker:
        life = self.machines[name].born
        worker: ModelWorker

        def told(what: str, epoch: int) -> None:
            if self.machines[name].born != life:
                return
            if what == "engine":
                self._engine_gone(name, epoch)
            else:
                self.control(name, self.source_name, lambda: self._ready(name))

        worker = ModelWorker(
            name, self.lent[name], self.recurrent, self.time, self.random,
            lambda ring, stage, frame: self.forward(name, worker, ring, stage, frame), told,
        )  # fmt: skip
        return worker

    def usable(self, name: str) -> bool:
        """Whether it could take part in a plan, as far as the source knows."""
        return name not in self.leaving and (name != self.source_name or self.workers[name].engine is not None)

    def kill(self, name: str) -> None:
        """The daemon and its engine die; a connection that is not cut breaks at once."""
        self.machines[name].die()
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
        self.look(name)

    def crash_engine(self, name: str) -> None:
        if self.machines[name].alive:
            self.workers[name].crash_engine()

    def _ready(self, name: str) -> None:
        """Its engine runs again."""
        if name == self.source_name or self.sight.condition(name) == "online":
            self.become(name, "online")

    def _engine_gone(self, name: str, epoch: int) -> None:
        if name == self.source_name:
            self.source = self._source()
            self.at_source(0.001, lambda: self.coordinator.engine_lost(name, epoch))
        else:
            self.control(name, self.source_name, lambda: self.coordinator.engine_lost(name, epoch))
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
        to = ring[stage][0] if stage < len(ring) else self.source_name
        back = frame.kind == "replay" and stage == len(ring)  # which may go back over a link that comes from there
        if to != name and not back and self._links.get((frame.epoch, name, to)) != self.paths.resets(name, to):
            return  # the link broke

        def arrive() -> None:
            if stage == len(ring):
                self.source.hear(frame)
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

    def _link_lost(self, name: str, to: str) -> None:
        engine = self.workers[name].engine
        for epoch, ring in list(engine.rings.items()) if engine is not None and self.machines[name].alive else []:
            order = [device for device, _, _ in ring]
            pairs = {frozenset((a, b)) for a, b in zip(order, [*order[1:], order[0]], strict=True)}
            if frozenset((name, to)) in pairs:
                event = on.LinksLost(name, epoch, f"{name} lost its link to {to}", to)
                self.control(name, self.source_name, lambda event=event: self.coordinator.feed(event))

    def reset(self, a: str, b: str) -> None:
        """All connections between two devices break."""
        self.paths.reset(a, b)
        self._link_lost(a, b)
        self._link_lost(b, a)
        for name in (a, b):
            self.look(name)

    # ---- what the source hears ------------------------------------------------------------------------------------

    def connected(self, name: str) -> bool:
        return name == self.source_name or self.sight.connected(name)

    def control(self, a: str, b: str, call: Callable[[], None]) -> None:
        """A message over the control connection with the source, if that stands."""
        if self.connected(b if a == self.source_name else a):
            self.paths.send(a, b, call)

    def look(self, name: str) -> None:
        """Something changed that decides whether the source hears the device."""
        if name != self.source_name:
            self.sight.look(name)

    def become(self, name: str, condition: on.DeviceCondition, reason: str = "", renewed: bool = False) -> None:
        """The source's membership says so."""
        if condition == "gone" or renewed:
            self.coordinator.lost(name)
        if condition == "online" and name in self.leaving:
            condition = "leaving"
        self.coordinator.feed(on.DeviceIs(name, condition, reason or f"{name} is {condition}", renewed))
        if renewed and self.random.random() < 0.5:  # else it is not told in time
            self._tell_holdings(name)
        worker, life = self.workers[name], self.machines[name].born
        if condition == "gone":  # the device counts for itself, too

            def grace() -> None:
                if self.machines[name].born == life and self.sight.condition(name) == "gone":
                    worker.drop()

            self.time.after(GRACE_S, lambda: self.machines[name].do(grace))

    def _tell_holdings(self, name: str) -> None:
        """Over its new connection the device says what it has loaded."""

        def told(layers: frozenset[int], born: int) -> None:
            running = self.coordinator.running
            if running is None or self.machines[name].born != born:
                return
            own = {n for d, a, b in self.coordinator.epochs[running].ring if d == name for n in range(a, b + 1)}
            if own - layers:
                self.coordinator.feed(on.EngineLost(name, running, f"{name} no longer has what it had loaded"))

        def tell() -> None:
            engine, born = self.workers[name].engine, self.machines[name].born
            layers = frozenset(engine.slots) if engine is not None else frozenset[int]()
            self.control(name, self.source_name, lambda: told(layers, born))

        self.control(self.source_name, name, tell)

    def leave(self, name: str, leaving: bool) -> None:
        (self.leaving.add if leaving else self.leaving.discard)(name)
        if self.sight.condition(name) == "online":
            self.become(name, "online")

    def at_source(self, delay: float, call: Callable[[], None]) -> None:
        self.time.after(delay, lambda: self.machines[self.source_name].do(call))

    # ---- answers --------------------------------------------------------------------------------------------------

    def ask(self, prompt: tuple[int, ...], seed: int, tokens: int) -> None:
        number = len(self.answers)
        self.answers.append(ModelAnswer(number, prompt, seed, reference(self.layers, prompt, seed, tokens)))
        self.admit()

    def cancel(self, number: int) -> None:
        if number < len(self.answers):
            self.answers[number].cancelled = True
            self.source.cancel(number)
            self.admit()

    def admit(self) -> None:
        """Whoever waits gets a slot, if one is free and the deployment serves."""
        if not self.coordinator.serving or self.workers[self.source_name].engine is None:
            return
        for answer in self.answers:
            if answer.done or answer.number in self.source.sequences:
                continue
            taken = {one.slot for one in self.source.sequences.values()}
            free = [slot for slot in range(SLOTS) if slot not in taken]
            if free:
                ids = [*answer.prompt, *answer.ids]
                left = len(answer.expected) - len(answer.ids)
                self.source.submit(answer.number, free[0], answer.seed, ids, left)

    def switch(self, epoch: int, done: Callable[[], None]) -> None:
        self.source.switch(epoch, done)
        self.admit()

    def carry(self, before: Ring, epoch: int, after: Ring) -> None:
        """Layers that change their device: what their slots keep is copied, while decoding goes on."""
        home = {n: device for device, first, last in before for n in range(first, last + 1)}
        new = {n: device for device, first, last in after for n in range(first, last + 1)}
        waiting = {n for n in home if home[n] != new[n]}

        def done(number: int) -> None:
            waiting.discard(number)
            if not waiting:
                self.coordinator.feed(on.Carried(epoch))

        if not waiting:
            self.at_source(0.0, lambda: done(-1))
        for number in sorted(waiting):
            self._carry(number, home[number], new[number], epoch, lambda number=number: done(number))

    def _carry(self, number: int, old: DeviceId, new: DeviceId, epoch: int, done: Callable[[], None]) -> None:
        def export() -> None:
            engine = self.workers[old].engine
            slots = engine.slots.get(number, {}) if engine is not None else {}
            kept = {slot: (one.sequence, list(one.kept)) for slot, one in slots.items()}
            self.paths.send(old, new, lambda: take(kept), f"carry {epoch}")

        def take(kept: dict[int, tuple[int, list[int]]]) -> None:
            engine = self.workers[new].engine
            if engine is not None and epoch in engine.rings:
                engine.take(number, epoch, kept)
            self.control(new, self.source_name, done)

        self.control(self.source_name, old, export)

    def _source(self) -> ModelSource:
        def send(frame: ModelFrame) -> None:
            worker = self.workers[self.source_name]
            if worker.engine is not None and frame.epoch in worker.engine.rings:
                self.forward(self.source_name, worker, worker.engine.rings[frame.epoch], 0, frame)

        def tell(number: int, position: int, token: int) -> None:
            if self.source is source:
                answer = self.answers[number]
                assert position == len(answer.prompt) + len(answer.ids) - 1, "a position is repeated or skipped"
                assert token == answer.expected[len(answer.ids)], f"answer {number} has a wrong token at {position}"
                answer.ids.append(token)
                if answer.done:
                    self.admit()

        source = ModelSource(send, tell)
        return source
