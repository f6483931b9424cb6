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

    placement: tuple[int, ...]
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
        no_relays: bool = False,
        usable_memory: UsableMemory | None = None,
    ) -> None:
        """`known` is what was found and proven before; `apart`: without relays; `fillings`: of the same memory."""
        # What all layers together take is all the room there is: sums over devices stay far from overflowing.
        problem = replace(problem, room=np.minimum(problem.room, problem.memory.sum(axis=0)))
        self.problem = problem
        self.table, self.usable_memory = (
            visit_table(problem, layer_runs(problem, no_relays=no_relays)),
            usable_memory or UsableMemory(problem),
        )
        self.best, self.placement = np.inf, ()  # type: tuple[float, tuple[int, ...]]
        self.bound, self.reached, self.work = 0.0, -1, 0
        self.relays_short = self.infeasible = False
        if known is not None and known.placement:
            self.best, self.placement, self.bound = known.cost, known.placement, known.bound
        self._interchangeable = interchangeable_devices(problem)
        self._price = initial_memory_price(self.table)

    @property
    def done(self) -> bool:
        return bool(self.bound >= self.best * (1 - EXACT))

    def result(self) -> Assignment:
        """What is known now."""
        if not self.placement:
            return Assignment((), np.inf, self.bound, self.reached, self.infeasible)
        bound = self.best if self.done else self.bound
        return Assignment(self.placement, self.best, bound, len(self.problem.cost) - 1, self.done)

    def close_gap(self, widths: tuple[int, ...], budget: int) -> None:
        """Sweep under one goal after the other, until they meet or the budget is spent."""
        relaxed, tried, settled = self._raise_bound(STEPS), np.inf, np.inf
        if not np.isfinite(relaxed.value):
            self._set_labels(relaxed, np.inf, widths[0], budget)
            self.infeasible = True
        while not (self.done or self.infeasible or self.relays_short):
            top = min(self.best * (1 - EXACT), tried)
            close = np.isfinite(top) and top - self.bound <= CLOSE * abs(top)
            if close and top == tried:  # that was tried
                break
            cutoff = self.bound + STRIDE * (top - self.bound) if np.isfinite(top) and not close else top
            decided: bool | None = None
            before = self.best
            for width in (*widths, np.inf):
                if width > WIDE_PASS and self.best < settled:  # before what takes long
                    settled = self.best
                    decided = True if self._search_neighbourhoods() else None
                if decided is None and width < np.inf:
                    decided = self._set_labels(relaxed, cutoff, int(width), budget)
                if decided is not None:
                    break
            if decided:
                tried = np.inf
                if not self.best < before:  # the way known, by another sum
                    break
            elif decided is False:
                self.infeasible = bool(np.isinf(cutoff))
                self.bound = max(self.bound, cutoff)
            else:
                tried = cutoff
                if close or np.isinf(cutoff) or tried - self.bound <= CLOSE * abs(tried):
                    break
            if self.work > budget:
                break

    def _solve(self, price: Floats) -> MemoryBound:
        self.work += (
            self.table.runs.hop.size + 6 * self.table.visit_cost.size + WORK_PER_PASS + WORK_PER_PRICE * price.size
        )
        return memory_bound(self.table, price.reshape(self.table.prices))

    def _raise_bound(self, steps: int, *, patient: bool = True) -> MemoryBound:
        """A better bound, and any way met on the way there that keeps every limit."""

        def judge(relaxed: MemoryBound) -> tuple[Floats, bool]:
            route = relaxed_device_route(self.table, relaxed)
            slopes, keeps = violations(self.table, relaxed, route)
            if keeps:
                self._accept(route)
            return slopes.ravel(), False

        cutoff = self.best if np.isfinite(self.best) else 1e300
        relaxed, _, _ = BundleMethod(self._solve, judge, patient=patient).maximise(self._price.ravel(), cutoff, steps)
        self._price = relaxed.price
        self.bound = max(self.bound, min(relaxed.value, self.best))
        return relaxed

    def _accept(self, route: DeviceRoute) -> float:
        placement = placement_over_relays(self.problem, self.table.runs, route)
        cost = placement_cost(self.problem, placement)
        if cost < self.best:
            self.best, self.placement = cost, placement
        return cost

    def _set_labels(self, relaxed: MemoryBound, cutoff: float, width: int, budget: float = np.inf) -> bool | None:
        """True: a way was found (see `unreal`); False: there is none within the goal; None: undecided."""
        labels = LabelSetting(self.table, self.usable_memory, relaxed, cutoff, self._interchangeable)
        route = labels.run(width, budget - self.work)
        self.work += labels.work
        self.reached = max(self.reached, labels.reached)
        if route is None:
            return False if labels.complete else None
        cost = self._accept(route)
        self.relays_short = bool(np.isinf(cost) or cost > cutoff * (1 + EXACT))
        if labels.complete:
            self.bound = min(labels.cost, self.best)
        return True

    def _search_neighbourhoods(self) -> bool:
        """Whether a better way was found in which only a few devices hold other layers than in the best one."""
        before = self.best
        for group in self._neighbourhoods():
            theirs = np.isin(np.arange(len(self.problem.room)), group)
            free: Flags = np.where(np.isin(self.placement, group)[:, None], theirs, False)
            free[np.arange(len(free)), self.placement] = True
            asked = replace(self.problem, cost=np.where(free, self.problem.cost, np.inf))
            part = GapSearch(asked, self.result(), usable_memory=self.usable_memory)
            kinds = self._price.shape[0] - len(self.table.entered)
            part._price[:kinds] = self._price[:kinds]
            relaxed = part._raise_bound(NEIGHBOURHOOD_STEPS, patient=False)
            if not part.done:
                part._set_labels(relaxed, self.best * (1 - EXACT), NEIGHBOURHOOD_WIDTH)
            self.work += part.work
            if part.best < self.best:
                self.best, self.placement = part.best, part.placement
        return self.best < before * (1 - EXACT)

    def _neighbourhoods(self) -> list[tuple[int, ...]]:
        """A few devices each: first who hold layers next to each other, then any."""
        order = list(dict.fromkeys(self.placement))
        close = [tuple(sorted(order[k : k + NEIGHBOURHOOD])) for k in range(max(1, len(order) - NEIGHBOURHOOD + 1))]
        rng, count = np.random.default_rng(0), len(self.problem.room)
        other = [tuple(sorted(rng.permutation(count)[:NEIGHBOURHOOD].tolist())) for _ in range(2 * NEIGHBOURHOODS)]
        return list(dict.fromkeys(close + other))[:NEIGHBOURHOODS]
