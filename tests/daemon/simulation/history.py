"""One history: a household, and faults at times drawn from a seed. What must hold is checked all the while."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

from peerllm.daemon.control_messages import Reserve
from peerllm.daemon.decide.deployment_life import deployment_events as on
from peerllm.errors import RefusedError
from tests.daemon.simulation.household import SimulatedHousehold
from tests.daemon.simulation.model_worker import LAYER_BYTES

FAULTS_S = 30.0  # faults happen until then
HEAL_S = 2.0  # after which all that was broken is mended
RECURRENT = 0.25  # share of the models that cannot go back
MEMBERSHIP = 8  # one history in so many has the real membership
SUCCESSION = 6  # ... and one in so many has devices that follow a coordinator, which may die
ONE_LEFT_S = 40.0  # within which one coordinator is left
SERVES_S = 20.0  # within which it serves again, and all answers end


class WrongHistoryError(AssertionError):
    """What happened when it went wrong, for whoever replays the seed."""


def household(random: Random, real_membership: bool, succession: bool) -> SimulatedHousehold:
    """Two to six devices that can hold the model together."""
    layers, count = random.randint(4, 6), random.randint(2, 6)
    least, most = (2, 3 if count > 2 else layers) if succession else (1, layers)  # so that plans have several devices
    while True:
        lent = [random.randint(least, most) for _ in range(count)]
        if sum(lent) >= layers:
            recurrent = random.random() < RECURRENT
            return SimulatedHousehold(random, layers, lent, recurrent, real_membership, succession)


# kind of fault, and how often it comes
FAULTS = {
    "blip": 4, "one_way": 2, "freeze": 4, "die": 4, "engine": 3, "reset": 3, "leave": 2, "memory": 1, "refusal": 2,
    "stubborn": 1, "conditions": 2, "rival": 1, "partition": 1, "cancel": 1,
}  # fmt: skip
LOSSES = {"blip": 3, "one_way": 1, "freeze": 6, "die": 8, "reset": 1, "partition": 6, "leave": 1, "memory": 1}
LONG = (0.9, 4.0, 8.0, 15.0)
SECONDS = (0.3, 0.9, 1.5, 2.5, 4.0, 12.0)


class History:
    """`faults`: how often each kind comes; `seconds`: how long one lasts; `until`: the time in which they come.

    `apart_s`: the time from one to the next, if that is not random. `resets`: connections may break with a cut.
    """

    def __init__(
        self, seed: int, faults: Mapping[str, int] = FAULTS, seconds: Sequence[float] = SECONDS,
        least: int = 1, most: int = 12, until: float = FAULTS_S, apart_s: float = 0.0, resets: bool = True,
        succession: bool = False,
    ) -> None:  # fmt: skip
        self.random, self._succession = Random(seed), succession
        self.house = household(self.random, seed % MEMBERSHIP == 0 and not succession, succession)
        self.story = self.house.story
        self._kinds, self._seconds, self._until, self._resets = faults, seconds, until, resets
        self._foreign = 0
        random, house = self.random, self.house
        for _ in range(random.randint(2, 5)):
            prompt = tuple(random.randrange(50_000) for _ in range(random.randint(1, 12)))
            seed, tokens = random.randrange(1 << 30), random.randint(5, 40)
            house.time.at(random.uniform(0, 20), lambda p=prompt, s=seed, t=tokens: house.ask(p, s, t))
        for number in range(random.randint(least, most)):
            house.time.at(1 + number * apart_s if apart_s else random.uniform(1, until), self._fault)
        for name in house.machines:
            house.paths.slow[name] = random.choice((0.0, 0.02, 0.1))

    def run(self) -> None:
        house = self.house
        try:
            house.start()
            house.time.at(self._until + HEAL_S, self._heal)
            if self._succession:
                house.time.run(self._until + HEAL_S + ONE_LEFT_S, self._one_is_left)
                if house.served:
                    house.check_one_left()
                return
            house.time.run(self._until + HEAL_S + SERVES_S, self._ended)
            if house.coordinator.gave_up:  # which it may only if it never served
                return
            assert house.coordinator.serving, "it does not serve again, though nothing stands in its way"
            assert all(answer.done for answer in house.answers), "an answer does not end"
        except AssertionError as error:
            logs = [side.coordinator.log for side in house.sides.values() if side.coordinator is not None]
            story = "\n".join([*self.story, *(line for log in logs for line in log)])
            raise WrongHistoryError(f"{error}\n{story}") from error

    def _ended(self) -> bool:
        coordinator = self.house.coordinator
        done = coordinator.serving and all(answer.done for answer in self.house.answers)
        return coordinator.gave_up or (done and self.house.time.now > self._until + HEAL_S + 1)

    def _one_is_left(self) -> bool:
        if self.house.time.now <= self._until + HEAL_S + 1:
            return False
        try:
            self.house.check_one_left()
        except AssertionError:
            return False
        return True

    # ---- faults ---------------------------------------------------------------------------------------------------

    def _fault(self) -> None:
        random, house = self.random, self.house
        kind = random.choices(list(self._kinds), self._kinds.values())[0]
        fault: Callable[[str, float], None] = getattr(self, f"_{kind}")
        others = [name for name in house.machines if name != house.source_name]
        if self._succession and random.random() < 0.7:  # one that coordinates
            others = house.coordinators or list(house.machines)
        fault(random.choice(others), random.choice(self._seconds))

    def _note(self, text: str) -> None:
        self.story.append(f"{self.house.time.now:8.3f} fault: {text}")

    def _mend(self, a: str, b: str) -> None:
        for pair in ((a, b), (b, a)):
            self.house.paths.mend(*pair)
        for name in (a, b):
            self.house.look(name)

    def _cut(self, a: str, b: str, seconds: float, ways: int) -> None:
        house = self.house
        for pair in [(a, b), (b, a)][:ways]:
            house.paths.cut(*pair)
        resets = self._resets and self.random.random() < 0.3
        for name in (a, b):
            house.look(name)

        def mend() -> None:
            if resets:
                house.reset(a, b)
            self._mend(a, b)

        house.time.after(seconds, mend)

    def _blip(self, name: str, seconds: float) -> None:
        other = self.random.choice([one for one in self.house.machines if one != name])
        self._note(f"{name} and {other} do not hear each other for {seconds} s")
        self._cut(name, other, seconds, ways=2)

    def _one_way(self, name: str, seconds: float) -> None:
        other = self.random.choice([one for one in self.house.machines if one != name])
        a, b = self.random.choice(((name, other), (other, name)))
        self._note(f"{b} does not hear {a} for {seconds} s")
        self._cut(a, b, seconds, ways=1)

    def _partition(self, _: str, seconds: float) -> None:
        names = list(self.house.machines)
        side = self.random.sample(names, self.random.randint(1, len(names) - 1))
        self._note(f"{side} are cut off for {seconds} s")
        for a in side:
            for b in sorted(set(names) - set(side)):
                self._cut(a, b, seconds, ways=2)

    def _freeze(self, name: str, seconds: float) -> None:
        if self.random.random() < 0.2 and not self._succession:
            name, seconds = self.house.source_name, min(seconds, 2.5)
        self._note(f"{name} stands still for {seconds} s")
        machine, house = self.house.machines[name], self.house
        if machine.frozen or not machine.alive:
            return
        machine.frozen, life = True, machine.born
        self._look_all(name)

        def thaw() -> None:
            if machine.born == life and machine.frozen:
                machine.thaw()
                self._look_all(name)

        house.time.after(seconds, thaw)

    def _look_all(self, name: str) -> None:
        for one in self.house.machines if name == self.house.source_name and not self._succession else (name,):
            self.house.look(one)

    def _die(self, name: str, seconds: float) -> None:
        if self.house.machines[name].alive:
            self._note(f"{name} dies for {seconds} s")
            self.house.kill(name)
            self.house.time.after(seconds, lambda: self.house.restart(name))

    def _engine(self, name: str, _: float) -> None:
        name = self.random.choice((name, self.house.source_name))
        self._note(f"{name} loses its engine")
        self.house.crash_engine(name)

    def _reset(self, name: str, _: float) -> None:
        other = self.random.choice([one for one in self.house.machines if one != name])
        self._note(f"connections between {name} and {other} break")
        if self.house.machines[name].alive and self.house.machines[other].alive:
            self.house.reset(name, other)

    def _leave(self, name: str, seconds: float) -> None:
        self._note(f"{name} asks to hold nothing for {seconds} s")
        self.house.leave(name, True)
        self.house.time.after(seconds, lambda: self.house.leave(name, False))

    def _memory(self, name: str, seconds: float) -> None:
        """Another model takes what memory is left, for a while."""
        ledger, now = self.house.workers[name].ledger, self.house.time.now
        nbytes = min(ledger.free_bytes, self.random.randint(1, 3) * LAYER_BYTES)
        self._foreign += 1
        other = f"{self._foreign:032x}"
        self._note(f"another model takes {nbytes} bytes of {name} for {seconds} s")
        ledger.reserve(Reserve(other, 1, nbytes, 600.0), "another", now)
        ledger.commit(other, 1, "another", now)
        self.house.time.after(seconds, lambda: ledger.release(other, 1, "another"))
        self.house.time.after(seconds, lambda: self._conditions(name, 0.0))

    def _refusal(self, name: str, _: float) -> None:
        self._note(f"{name} refuses the next question")
        self.house.workers[name].refusals += 1

    def _stubborn(self, name: str, seconds: float) -> None:
        self._note(f"{name} refuses all questions for {seconds} s")
        worker = self.house.workers[name]
        worker.refusals += 10_000

        def relent() -> None:
            worker.refusals = 0

        self.house.time.after(seconds, relent)

    def _conditions(self, *_: object) -> None:
        for name, side in self.house.sides.items():
            if (coordinator := side.coordinator) is not None:
                side.control(name, name, lambda one=coordinator: one.feed(on.ConditionsChanged("")))

    def _rival(self, name: str, _: float) -> None:
        """Another device gives orders for the deployment; a device that obeys one coordinator refuses."""
        worker = self.house.workers[name]
        if not any(p.deployment == self.house.deployment for p in worker.ledger.promises()):
            return
        self._note(f"a rival asks {name} for the deployment")
        before = worker.ledger.promises()
        try:
            worker.ledger.reserve(Reserve(self.house.deployment, 10_000, 0, 10.0), "rival", self.house.time.now)
        except RefusedError:
            pass
        else:
            raise AssertionError("a device obeys two coordinators")
        worker.release("rival", 10_000, False, lambda reply: None)
        worker.ledger.release(self.house.deployment, 10_000, "rival")
        assert set(worker.ledger.promises()) <= set(before)
        kept = [p for p in before if p.until is None]
        assert set(kept) <= set(worker.ledger.promises()), "a rival released what another coordinator holds"

    def _cancel(self, *_: object) -> None:
        if self.house.answers:
            number = self.random.randrange(len(self.house.answers))
            self._note(f"the client of answer {number} hangs up")
            self.house.cancel(number)

    def _heal(self) -> None:
        self._note("all is mended")
        house = self.house
        for machine in house.machines.values():
            if machine.frozen:
                machine.thaw()
        for name in house.machines:
            house.restart(name)
            house.workers[name].refusals = 0
            for other in house.machines:
                if other != name:
                    house.paths.mend(name, other)
        for name in house.machines:
            if name in house.leaving:
                house.leave(name, False)
            house.look(name)
