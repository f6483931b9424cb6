"""The best way met and what no way can beat, brought together: prices, sweeps of labels, and parts solved anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from peerllm.planner.arrays import Flags, Floats
from peerllm.planner.latency.assignment_problem import (
    AssignmentProblem,
    DeviceRoute,
    interchangeable_devices,
    placement_cost,
)
from peerllm.planner.latency.mixed_layers.label_setting import LabelSetting
from peerllm.planner.latency.mixed_layers.layer_runs import layer_runs
from peerllm.planner.latency.mixed_layers.memory_relaxation import (
    MemoryBound,
    initial_memory_price,
    memory_bound,
    relaxed_device_route,
    violations,
    visit_table,
)
from peerllm.planner.latency.mixed_layers.relay_hops import placement_over_relays
from peerllm.planner.latency.mixed_layers.usable_memory import UsableMemory
from peerllm.planner.routing.bundle_method import BundleMethod

EXACT = 1e-10  # relative; two ways closer than this are one
STEPS = 150  # of the ascent
STRIDE = 0.3  # of the way from the bound to the best that is tried next
CLOSE = 1e-4  # relative; so close to the best, all that is better is tried at once
WORK_PER_PASS, WORK_PER_PRICE = 300_000, 1000  # of an ascent, in array elements
WIDE_PASS = 400  # labels; before a wider sweep
NEIGHBOURHOOD = 4  # devices' layers are dealt anew: is there a better way?
NEIGHBOURHOODS, NEIGHBOURHOOD_STEPS, NEIGHBOURHOOD_WIDTH = 24, 12, 400  # such parts tried, passes and labels for each


@dataclass(frozen=True, slots=True)
class Assignment:
    """`homes` is empty when nothing was found; then `reached` is the last layer that found a place."""

    homes: tuple[int, ...]
    cost: float
    bound: float
    reached: int = -1
    proven: bool = True


class GapSearch:
    """`work` counts array elements touched. `unreal`: a way was met whose relays have too few layers to hand out."""

    def __init__(
        self,
        problem: AssignmentProblem,
        known: Assignment | None = None,
        *,
        apart: bool = False,
        fillings: UsableMemory | None = None,
    ) -> None:
        """`known` is what was found and proven before; `apart`: without relays; `fillings`: of the same memory."""
        # What all layers together take is all the room there is: sums over devices stay far from overflowing.
        problem = replace(problem, room=np.minimum(problem.room, problem.memory.sum(axis=0)))
        self.problem = problem
        self.held, self.fillings = (
            visit_table(problem, layer_runs(problem, apart=apart)),
            fillings or UsableMemory(problem),
        )
        self.best, self.homes = np.inf, ()  # type: tuple[float, tuple[int, ...]]
        self.bound, self.reached, self.work = 0.0, -1, 0
        self.unreal = self.impossible = False
        if known is not None and known.homes:
            self.best, self.homes, self.bound = known.cost, known.homes, known.bound
        self._twins = interchangeable_devices(problem)
        self._price = initial_memory_price(self.held)

    @property
    def done(self) -> bool:
        return bool(self.bound >= self.best * (1 - EXACT))

    def found(self) -> Assignment:
        """What is known now."""
        if not self.homes:
            return Assignment((), np.inf, self.bound, self.reached, self.impossible)
        bound = self.best if self.done else self.bound
        return Assignment(self.homes, self.best, bound, len(self.problem.cost) - 1, self.done)

    def narrow(self, widths: tuple[int, ...], budget: int) -> None:
        """Sweep under one goal after the other, until they meet or the budget is spent."""
        found, tried, settled = self._ascend(STEPS), np.inf, np.inf
        if not np.isfinite(found.value):
            self._swept(found, np.inf, widths[0], budget)
            self.impossible = True
        while not (self.done or self.impossible or self.unreal):
            top = min(self.best * (1 - EXACT), tried)
            near = np.isfinite(top) and top - self.bound <= CLOSE * abs(top)
            if near and top == tried:  # that was tried
                break
            goal = self.bound + STRIDE * (top - self.bound) if np.isfinite(top) and not near else top
            decided: bool | None = None
            before = self.best
            for width in (*widths, np.inf):
                if width > WIDE_PASS and self.best < settled:  # before what takes long
                    settled = self.best
                    decided = True if self._dealt_anew() else None
                if decided is None and width < np.inf:
                    decided = self._swept(found, goal, int(width), budget)
                if decided is not None:
                    break
            if decided:
                tried = np.inf
                if not self.best < before:  # the way known, by another sum
                    break
            elif decided is False:
                self.impossible = bool(np.isinf(goal))
                self.bound = max(self.bound, goal)
            else:
                tried = goal
                if near or np.isinf(goal) or tried - self.bound <= CLOSE * abs(tried):
                    break
            if self.work > budget:
                break

    def _solve(self, price: Floats) -> MemoryBound:
        self.work += self.held.runs.hop.size + 6 * self.held.whole.size + WORK_PER_PASS + WORK_PER_PRICE * price.size
        return memory_bound(self.held, price.reshape(self.held.prices))

    def _ascend(self, steps: int, *, patient: bool = True) -> MemoryBound:
        """A better bound, and any way met on the way there that keeps every limit."""

        def judge(found: MemoryBound) -> tuple[Floats, bool]:
            way = relaxed_device_route(self.held, found)
            slopes, keeps = violations(self.held, found, way)
            if keeps:
                self._take(way)
            return slopes.ravel(), False

        goal = self.best if np.isfinite(self.best) else 1e300
        found, _, _ = BundleMethod(self._solve, judge, patient=patient).climb(self._price.ravel(), goal, steps)
        self._price = found.price
        self.bound = max(self.bound, min(found.value, self.best))
        return found

    def _take(self, way: DeviceRoute) -> float:
        homes = placement_over_relays(self.problem, self.held.runs, way)
        cost = placement_cost(self.problem, homes)
        if cost < self.best:
            self.best, self.homes = cost, homes
        return cost

    def _swept(self, found: MemoryBound, goal: float, width: int, budget: float = np.inf) -> bool | None:
        """True: a way was found (see `unreal`); False: there is none within the goal; None: undecided."""
        sweep = LabelSetting(self.held, self.fillings, found, goal, self._twins)
        way = sweep.run(width, budget - self.work)
        self.work += sweep.work
        self.reached = max(self.reached, sweep.reached)
        if way is None:
            return False if sweep.whole else None
        cost = self._take(way)
        self.unreal = bool(np.isinf(cost) or cost > goal * (1 + EXACT))
        if sweep.whole:
            self.bound = min(sweep.cost, self.best)
        return True

    def _dealt_anew(self) -> bool:
        """Whether a better way was found in which only a few devices hold other layers than in the best one."""
        before = self.best
        for group in self._groups():
            theirs = np.isin(np.arange(len(self.problem.room)), group)
            free: Flags = np.where(np.isin(self.homes, group)[:, None], theirs, False)
            free[np.arange(len(free)), self.homes] = True
            asked = replace(self.problem, cost=np.where(free, self.problem.cost, np.inf))
            part = GapSearch(asked, self.found(), fillings=self.fillings)
            kinds = self._price.shape[0] - len(self.held.entered)
            part._price[:kinds] = self._price[:kinds]
            found = part._ascend(NEIGHBOURHOOD_STEPS, patient=False)
            if not part.done:
                part._swept(found, self.best * (1 - EXACT), NEIGHBOURHOOD_WIDTH)
            self.work += part.work
            if part.best < self.best:
                self.best, self.homes = part.best, part.homes
        return self.best < before * (1 - EXACT)

    def _groups(self) -> list[tuple[int, ...]]:
        """A few devices each: first who hold layers next to each other, then any."""
        order = list(dict.fromkeys(self.homes))
        near = [tuple(sorted(order[k : k + NEIGHBOURHOOD])) for k in range(max(1, len(order) - NEIGHBOURHOOD + 1))]
        rng, count = np.random.default_rng(0), len(self.problem.room)
        other = [tuple(sorted(rng.permutation(count)[:NEIGHBOURHOOD].tolist())) for _ in range(2 * NEIGHBOURHOODS)]
        return list(dict.fromkeys(near + other))[:NEIGHBOURHOODS]
