"""Close the gap between the best assignment and the bound: Lagrangian prices, label setting, neighbourhood search.

Label setting is asked for routes below a cutoff between bound and best. It finds one, refutes the cutoff, or gives up
at its label limit; then a higher cutoff or a wider limit is tried.
"""

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

EXACT = 1e-10  # relative; placements closer than this count as equal
STEPS = 150  # bounds computed at most
STRIDE = 0.3  # the next cutoff lies so far from the bound towards the best
CLOSE = 1e-4  # relative; with so small a gap the cutoff is the best itself
WORK_PER_PASS, WORK_PER_PRICE = 300_000, 1000  # of computing a bound, in array elements
WIDE_PASS = 400  # labels; a neighbourhood search comes before anything wider
NEIGHBOURHOOD = 4  # devices whose layers are assigned anew together
NEIGHBOURHOODS, NEIGHBOURHOOD_STEPS, NEIGHBOURHOOD_WIDTH = 24, 12, 400  # groups tried; bounds and labels for each


@dataclass(frozen=True, slots=True)
class Assignment:
    """A device for each layer. `placement` is empty if none was found; `reached` is then the last layer placed."""

    placement: tuple[int, ...]
    cost: float
    bound: float
    reached: int = -1
    proven: bool = True


class GapSearch:
    """The state of one search; `work` counts array elements touched.

    `relays_short` is set when a route was found whose relays have too few layers to take: the search must be repeated
    without relays.
    """

    def __init__(
        self,
        problem: AssignmentProblem,
        known: Assignment | None = None,
        *,
        no_relays: bool = False,
        usable_memory: UsableMemory | None = None,
    ) -> None:
        """`known` is what was found and proven before; `usable_memory` that of a problem with the same memory."""
        # No device needs more room than all layers take; this keeps sums over devices far from overflowing.
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
        """Whether the bound proves the best."""
        return bool(self.bound >= self.best * (1 - EXACT))

    def result(self) -> Assignment:
        """What is known now."""
        if not self.placement:
            return Assignment((), np.inf, self.bound, self.reached, self.infeasible)
        bound = self.best if self.done else self.bound
        return Assignment(self.placement, self.best, bound, len(self.problem.cost) - 1, self.done)

    def close_gap(self, widths: tuple[int, ...], budget: int) -> None:
        """Try one cutoff after the other until bound and best meet or the budget is spent."""
        relaxed, tried, settled = self._raise_bound(STEPS), np.inf, np.inf
        if not np.isfinite(relaxed.value):
            self._set_labels(relaxed, np.inf, widths[0], budget)
            self.infeasible = True
        while not (self.done or self.infeasible or self.relays_short):
            top = min(self.best * (1 - EXACT), tried)
            close = np.isfinite(top) and top - self.bound <= CLOSE * abs(top)
            if close and top == tried:  # this cutoff was tried
                break
            cutoff = self.bound + STRIDE * (top - self.bound) if np.isfinite(top) and not close else top
            decided: bool | None = None
            before = self.best
            for width in (*widths, np.inf):
                if width > WIDE_PASS and self.best < settled:  # cheap beside a wide pass
                    settled = self.best
                    decided = True if self._search_neighbourhoods() else None
                if decided is None and width < np.inf:
                    decided = self._set_labels(relaxed, cutoff, int(width), budget)
                if decided is not None:
                    break
            if decided:
                tried = np.inf
                if not self.best < before:  # the known placement again, its costs summed in another order
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
        """Raise the bound by better prices; relaxed routes that keep every limit are taken on the way."""

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
        """True: a route was found (see `relays_short`). False: there is none within the cutoff. None: undecided."""
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
        """Whether a better placement was found in which only a few devices hold other layers than in the best one."""
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
        """Small groups of devices: first those that hold neighbouring layers, then random ones."""
        order = list(dict.fromkeys(self.placement))
        close = [tuple(sorted(order[k : k + NEIGHBOURHOOD])) for k in range(max(1, len(order) - NEIGHBOURHOOD + 1))]
        rng, count = np.random.default_rng(0), len(self.problem.room)
        other = [tuple(sorted(rng.permutation(count)[:NEIGHBOURHOOD].tolist())) for _ in range(2 * NEIGHBOURHOODS)]
        return list(dict.fromkeys(close + other))[:NEIGHBOURHOODS]
