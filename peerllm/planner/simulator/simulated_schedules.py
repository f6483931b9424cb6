"""When each pass may start: EdgeShard's three ways to run a pipeline, as state machines."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from peerllm.planner.simulator.pass_legs import Leg
from peerllm.types import ScheduleName


@dataclass(frozen=True, slots=True)
class SimulatedPass:
    """One journey through the stages: a decode step of a group (step 1, 2, ...) or a chunk of one prompt (step 0)."""

    group: int
    step: int
    legs: tuple[Leg, ...]
    sequence: int | None = None  # whose prompt


Passes = Callable[[int, int], Sequence[SimulatedPass]]  # (group, step): the passes of that step


class SimulatedSchedule(Protocol):
    """Told of every pass that ended, returns the passes that start now. A group's step ends with its last pass."""

    def start(self) -> Sequence[SimulatedPass]: ...

    def ended(self, done: SimulatedPass) -> Sequence[SimulatedPass]: ...


class SimulatedNoBubble:
    """Each group starts its next step as soon as its own tokens are back."""

    def __init__(self, groups: int, steps: range, passes: Passes) -> None:
        self._groups, self._steps, self._passes = groups, steps, passes
        self._open: Counter[int] = Counter()  # passes under way, by group

    def start(self) -> list[SimulatedPass]:
        return [one for group in range(self._groups) for one in self._next(group, self._steps.start)]

    def ended(self, done: SimulatedPass) -> list[SimulatedPass]:
        self._open[done.group] -= 1
        return [] if self._open[done.group] else self._next(done.group, done.step + 1)

    def _next(self, group: int, step: int) -> list[SimulatedPass]:
        found = list(self._passes(group, step)) if step in self._steps else []
        self._open[group] = len(found)
        return found


class SimulatedBubble:
    """Step t + 1 starts when every group has finished step t."""

    def __init__(self, groups: int, steps: range, passes: Passes) -> None:
        self._groups, self._steps, self._passes = groups, steps, passes
        self._open = 0  # passes under way

    def start(self) -> list[SimulatedPass]:
        return self._all(self._steps.start)

    def ended(self, done: SimulatedPass) -> list[SimulatedPass]:
        self._open -= 1
        return [] if self._open else self._all(done.step + 1)

    def _all(self, step: int) -> list[SimulatedPass]:
        found = [one for g in range(self._groups) for one in self._passes(g, step)] if step in self._steps else []
        self._open = len(found)
        return found


class SimulatedSequential:
    """One pass at a time in the whole household; the groups take turns, step by step."""

    def __init__(self, groups: int, steps: range, passes: Passes) -> None:
        self._free_running = SimulatedNoBubble(groups, steps, passes)
        self._line: deque[SimulatedPass] = deque()

    def start(self) -> list[SimulatedPass]:
        self._line.extend(self._free_running.start())
        return self._first()

    def ended(self, done: SimulatedPass) -> list[SimulatedPass]:
        self._line.extend(self._free_running.ended(done))
        return self._first()

    def _first(self) -> list[SimulatedPass]:
        return [self._line.popleft()] if self._line else []


SCHEDULES: dict[ScheduleName, Callable[[int, range, Passes], SimulatedSchedule]] = {
    "sequential": SimulatedSequential,
    "bubble": SimulatedBubble,
    "no-bubble": SimulatedNoBubble,
}
