"""Lower bounds for the latency search: memory limits become prices (Lagrangian relaxation).

A route is a chain of visits, and a device may be visited any number of times as long as no single visit exceeds its
room. Each visit pays prices of its device:

- for the share of the room that it takes;
- for this share rounded down to whole m-th parts, of which all visits together take at most m - 1 (Chvátal's rounding;
  for m = 2: only one visit takes more than half);
- in a run of equal layers, for each visit there: one is enough, and hops are as short as relays could make them.

Each visit gets a discount, because a device that is not used at all pays nothing and is not refunded its room either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.latency.assignment_problem import AssignmentProblem, DeviceRoute
from peerllm.planner.latency.mixed_layers.layer_runs import LayerRuns

PARTS = range(2, 17)  # m
_CUTS = sorted({Fraction(k, m) for m in PARTS for k in range(m)})
CUTS: Floats = np.array([float(cut) for cut in _CUTS])  # shares at which a rounding goes up by one part
ROUNDED: Floats = np.array(
    [[cut * m // 1 / (m - 1) for cut in _CUTS] for m in PARTS]
)  # [parts, cuts]: rounded share from each cut on


@dataclass(frozen=True, slots=True)
class VisitTable:
    """All possible visits, without prices; index e of a prefix covers layers 0..e-1."""

    problem: AssignmentProblem
    cost: Floats  # [devices, layers + 1] prefix; forbidden layers count 0, and `far` ends before them
    memory: Ints  # [devices, layers + 1] prefix
    far: Ints  # [devices, layers]: the last layer that one visit starting at i can hold (i - 1: none)
    runs: LayerRuns
    entered: Ints  # [priced runs]: first layer
    unit: Floats  # [devices]: the bytes that a share of 1 stands for, one more than the room
    largest_share: Floats  # [devices]: the largest share that all visits may take together
    # Of a visit that starts at a layer and holds so many more layers after it:
    visit_cost: Floats  # [devices, layers, more]: infinite where it does not fit
    share: Floats  # [devices, layers, more]
    step: Ints  # [devices, layers, more]: index of the last of CUTS that the share reaches
    enters: Floats  # [priced runs, layers, more]: 1 if part of it lies in the run

    @property
    def prices(self) -> tuple[int, int]:
        """The shape of the prices: (kinds, devices)."""
        return len(PARTS) + 2 + len(self.entered), len(self.unit)


def visit_table(problem: AssignmentProblem, runs: LayerRuns) -> VisitTable:
    """All visits of the problem within each device's room."""
    layers, devices = problem.cost.shape
    finite = np.isfinite(problem.cost)
    cost = np.zeros((devices, layers + 1))
    cost[:, 1:] = np.where(finite, problem.cost, 0.0).cumsum(axis=0).T
    memory = np.zeros((devices, layers + 1), dtype=np.int64)
    memory[:, 1:] = problem.memory.cumsum(axis=0).T
    allowed = np.full((layers + 1, devices), layers - 1, dtype=np.int64)
    for i in range(layers - 1, -1, -1):
        allowed[i] = np.where(finite[i], allowed[i + 1], i - 1)
    far = np.empty((devices, layers), dtype=np.int64)
    for j in range(devices):
        far[j] = np.searchsorted(memory[j], memory[j, :layers] + problem.room[j], side="right") - 2
    start = np.arange(layers)[:, None]
    far = np.maximum(np.minimum(far, allowed[:layers].T), start.T - 1)
    end = start + np.arange(max(1, int((far - start.T).max()) + 1))
    open_, end = end <= far[:, :, None], np.minimum(end, layers - 1)
    unit = np.maximum(problem.room + 1.0, 1.0)
    share = np.where(open_, memory[:, end + 1] - memory[:, start], 0) / unit[:, None, None]
    visit_cost = np.where(open_, cost[:, end + 1] - cost[:, start], np.inf)
    largest_share = np.minimum(problem.room, memory[:, -1]).clip(0) / unit
    entered = np.flatnonzero((runs.priced >= 0) & (runs.first == start[:, 0]))
    enters = (end >= entered[:, None, None]) & (start <= runs.last[entered][:, None, None])
    return VisitTable(
        problem,
        cost,
        memory,
        far,
        runs,
        entered,
        unit,
        largest_share,
        visit_cost,
        share,
        step_of(share),
        enters.astype(float),
    )


def step_of(share: Floats) -> Ints:
    """The index of the last of CUTS that each share reaches."""
    step: Ints = np.searchsorted(CUTS, share, side="right") - 1
    return step


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """The relaxed optimum under some prices, none of them negative; costs are infinite where no route leads on."""

    price: Floats  # [kinds, devices]
    share: Floats  # [devices]: price of a share of 1
    steps: Floats  # [devices, cuts]: price of the rounded shares from each cut on
    discount: Floats  # [devices]: taken off each visit
    run_price: Floats  # [priced runs, devices]: price of a visit to the run; one is refunded to every device
    charged: Floats  # [devices, layers, more]: cost of a visit, prices included
    visit: Floats  # [layers + 1, devices]: cost to go when starting a visit at layer i
    leave: Floats  # [devices, layers]: cost to go when leaving a device after layer i
    value: float  # the bound on any route

    def refund(self, share: Floats) -> Floats:
        """[labels]: the most that visits within a `share` [labels, devices] of each device could be charged.

        Any number of visits pays back at least one discount. Run prices come on top.
        """
        return self.refunds(share, np.arange(len(self.share))).sum(axis=-1)  # type: ignore[no-any-return]

    def refunds(self, share: Floats, device: Ints) -> Floats:
        """The same for single devices."""
        largest_share: Floats = share * self.share[device] + self.steps[device, step_of(share)] - self.discount[device]
        return np.maximum(largest_share, 0.0)


def memory_bound(table: VisitTable, price: Floats) -> MemoryBound:
    """The bound under these prices [kinds, devices], by dynamic programming from the last layer back."""
    devices, layers, width = table.visit_cost.shape
    share, parts, discount, run_price = (
        price[0],
        price[1 : 1 + len(PARTS)],
        price[1 + len(PARTS)],
        price[2 + len(PARTS) :],
    )
    steps = parts.T @ ROUNDED
    charged = table.visit_cost + share[:, None, None] * table.share - discount[:, None, None]
    charged += steps[np.arange(devices)[:, None, None], table.step]
    for each, enters in zip(run_price, table.enters, strict=True):
        charged += each[:, None, None] * enters
    visit = np.full((layers + 1, devices), np.inf)
    leave = np.full((devices, layers), np.inf)
    leave[:, -1] = table.problem.back
    for i in range(layers - 1, -1, -1):
        if i < layers - 1:
            leave[:, i] = (table.runs.hop[i] + visit[i + 1]).min(axis=1)
        ahead = leave[:, i : i + width]
        visit[i] = (charged[:, i, : ahead.shape[1]] + ahead).min(axis=1)
    relaxed = MemoryBound(price, share, steps, discount, run_price, charged, visit, leave, 0.0)
    return replace(relaxed, value=float(visit[0, 0] - relaxed.refund(table.largest_share) - run_price.sum()))


def relaxed_device_route(table: VisitTable, relaxed: MemoryBound) -> DeviceRoute:
    """A cheapest relaxed route as (device, last layer) of each visit. Call it only where `value` is finite."""
    layers, width = relaxed.charged.shape[1:]
    route: DeviceRoute = []
    device, start = 0, 0
    while True:
        ahead = relaxed.leave[device, start : start + width]
        end = start + int((relaxed.charged[device, start, : len(ahead)] + ahead).argmin())
        route.append((device, end))
        if end == layers - 1:
            return route
        start = end + 1
        device = int((table.runs.hop[end, device] + relaxed.visit[start]).argmin())


def violations(table: VisitTable, relaxed: MemoryBound, route: DeviceRoute) -> tuple[Floats, bool]:
    """[kinds, devices]: by how much `route` exceeds what each price stands for; whether it keeps every room."""
    use, used = np.zeros(table.prices), np.zeros(len(table.unit), dtype=np.int64)
    start = 0
    for device, end in route:
        at = device, start, end - start
        used[device] += table.memory[device, end + 1] - table.memory[device, start]
        use[0, device] += table.share[at]
        use[1 : 1 + len(PARTS), device] += ROUNDED[:, table.step[at]]
        use[1 + len(PARTS), device] -= 1
        use[2 + len(PARTS) :, device] += table.enters[:, start, end - start]
        start = end + 1
    given = (
        relaxed.refunds(table.largest_share, np.arange(len(table.largest_share))) > 0
    )  # whether the device is refunded
    use[0] -= table.largest_share * given
    use[1 : 1 + len(PARTS)] -= ROUNDED[:, step_of(table.largest_share)] * given
    use[1 + len(PARTS)] += given
    use[2 + len(PARTS) :] -= 1
    return use, bool((used <= table.problem.room).all())


def initial_memory_price(table: VisitTable) -> Floats:
    """[kinds, devices]: a start: the price of a share if layers simply fill the fastest devices first."""
    problem = table.problem
    room = table.largest_share * table.unit
    pace = table.cost[:, -1] / np.maximum(table.memory[:, -1], 1)
    left, dearest = float(problem.memory.min(axis=1).sum()), 0.0
    for device in np.argsort(pace):
        dearest = float(pace[device])
        left -= float(room[device])
        if left <= 0:
            break
    price = np.zeros(table.prices)
    price[0] = np.where(room > 0, np.maximum(0.0, dearest - pace), 0.0) * table.unit
    return price
