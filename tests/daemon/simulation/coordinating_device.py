"""A device's part in what only a coordinator does: it hears of the others, plans, and feeds sequences.

Every device of a history with succession has one; else the source alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from peerllm.daemon.decide.deployment_life import deployment_events as on
from peerllm.daemon.decide.deployment_life.deployment_decider import DeploymentDecider
from peerllm.daemon.decide.membership import GRACE_S
from peerllm.types import DeviceId
from tests.daemon.simulation.model_coordinator import ModelCoordinator
from tests.daemon.simulation.model_engine import ModelFrame, Ring
from tests.daemon.simulation.model_source import ModelSource
from tests.daemon.simulation.sight import MembershipSight, PlainSight, Sight

if TYPE_CHECKING:
    from tests.daemon.simulation.household import SimulatedHousehold

SLOTS = 3


class CoordinatingDevice:
    """`coordinator` is None while another device coordinates. `wanted` are the answers that it is to compute."""

    def __init__(self, house: SimulatedHousehold, name: str, real_membership: bool) -> None:
        self.house, self.source_name = house, name
        self.time, self.random, self.paths = house.time, house.random, house.paths
        self.machines, self.workers, self.leaving = house.machines, house.workers, house.leaving
        self.layers, self.deployment = house.layers, house.deployment
        self.answers_now, self.connect = house.answers_now, house.connect
        self.coordinator: ModelCoordinator | None = None
        self.source = self._source()
        self.wanted: dict[int, list[int]] = {}  # what is known here of each
        self.draining = False
        self._first = 0  # what answers' numbers are counted from: no two coordinators share a sequence's
        self.sight: Sight = MembershipSight(self) if real_membership else PlainSight(self)

    def begin(self, epoch: int = 0, lasting: bool = False) -> None:
        """Coordinate from now on, with epochs after that one."""
        self.draining = False
        self._first = self.house.next_number()
        self.source = self._source()
        decider = DeploymentDecider(self.source_name, lasting, epoch)
        self.coordinator = coordinator = ModelCoordinator(self, self.random, decider)
        coordinator.feed(on.DeviceIs(self.source_name, "online"))
        for name in self.machines:
            if name != self.source_name:
                coordinator.feed(on.DeviceIs(name, self._condition(name), f"{name} is {self._condition(name)}"))
        coordinator.feed(on.DeadlineReached() if lasting else on.Asked())

    def end(self) -> None:
        """Coordinate no longer."""
        if self.coordinator is not None:
            self.coordinator.over = True
        self.coordinator = None
        self.source = self._source()
        self.wanted.clear()

    def usable(self, name: str) -> bool:
        """Whether it could take part in a plan, as far as is known here."""
        return name not in self.leaving and (name != self.source_name or self.workers[name].engine is not None)

    def at_source(self, delay: float, call: Callable[[], None]) -> None:
        life = self.machines[self.source_name].born

        def then() -> None:
            if self.machines[self.source_name].born == life:
                self.machines[self.source_name].do(call)

        self.time.after(delay, then)

    # ---- what it hears --------------------------------------------------------------------------------------------

    def connected(self, name: str) -> bool:
        return name == self.source_name or self.sight.connected(name)

    def control(self, a: str, b: str, call: Callable[[], None]) -> None:
        """A message over the control connection with this device, if that stands."""
        if self.connected(b if a == self.source_name else a):
            self.paths.send(a, b, call)

    def look(self, name: str) -> None:
        """Something changed that decides whether this device hears the other."""
        if name != self.source_name:
            self.sight.look(name)

    def _condition(self, name: str) -> on.DeviceCondition:
        condition = self.sight.condition(name)
        return "leaving" if condition == "online" and name in self.leaving else condition

    def become(self, name: str, condition: on.DeviceCondition, reason: str = "", renewed: bool = False) -> None:
        """This device's membership says so."""
        self.house.heard(self, name, condition, renewed)
        coordinator = self.coordinator
        if coordinator is None:
            return
        if condition == "gone" or renewed:
            coordinator.lost(name)
        if condition == "online" and name in self.leaving:
            condition = "leaving"
        coordinator.feed(on.DeviceIs(name, condition, reason or f"{name} is {condition}", renewed))
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
        self.control(self.source_name, name, lambda: self.hear_holdings(name))

    def hear_holdings(self, name: str) -> None:
        """A device tells this one what it has loaded now."""
        engine, born = self.workers[name].engine, self.machines[name].born
        layers = frozenset(engine.slots) if engine is not None else frozenset[int]()

        def told() -> None:
            coordinator = self.coordinator
            running = coordinator.running if coordinator is not None else None
            if coordinator is None or running is None or self.machines[name].born != born:
                return
            own = {n for d, a, b in coordinator.epochs[running].ring if d == name for n in range(a, b + 1)}
            if own - layers:
                coordinator.feed(on.EngineLost(name, running, f"{name} no longer has what it had loaded"))

        self.control(name, self.source_name, told)

    def engine_gone(self, name: str, epoch: int) -> None:
        """A device tells this one that its engine ended."""
        if name == self.source_name:
            self.source = self._source()
        if self.coordinator is not None:
            self.coordinator.engine_lost(name, epoch)

    # ---- answers --------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Whoever waits gets a slot, if one is free and the deployment serves."""
        coordinator = self.coordinator
        if coordinator is None or not coordinator.serving or self.workers[self.source_name].engine is None:
            return
        if not self.draining:
            self.house.route(self)
        for number, known in self.wanted.items():
            answer, sequence = self.house.answers[number], self._first + number
            if answer.done or sequence in self.source.sequences:
                continue
            taken = {one.slot for one in self.source.sequences.values()}
            free = [slot for slot in range(SLOTS) if slot not in taken]
            if free:
                left = len(answer.expected) - len(known)
                self.source.submit(sequence, free[0], answer.seed, [*answer.prompt, *known], left)

    def cancel(self, number: int) -> None:
        self.source.cancel(self._first + number)
        self.admit()

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
            if not waiting and self.coordinator is not None:
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
                self.house.forward(self.source_name, worker, worker.engine.rings[frame.epoch], 0, frame)

        def tell(sequence: int, position: int, token: int) -> None:
            if self.source is source:
                number = sequence - self._first
                answer, known = self.house.answers[number], self.wanted[number]
                assert position == len(answer.prompt) + len(known) - 1, "a position is repeated or skipped"
                assert token == answer.expected[len(known)], f"answer {number} has a wrong token at {position}"
                known.append(token)
                if len(known) > len(answer.ids):
                    answer.ids.append(token)
                self.house.token_came(self, number)
                if answer.done:
                    self.admit()

        source = ModelSource(send, tell)
        return source
