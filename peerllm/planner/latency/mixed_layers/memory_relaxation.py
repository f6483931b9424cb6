"""Lower bounds for the latency search: memory limits become prices (Lagrangian relaxation).

A way is a chain of visits. Priced are, of every device, the share of its room that visits take, and that share rounded:
counted in whole m-th parts, all visits together take m - 1 at most (Chvátal's rounding; for m = 2: one visit takes more
than half). Every visit is let off a toll, because who leaves a device alone is given back the price of its room less
one toll. Within a run of layers alike a device is visited once: each visit there has its price, and hops are as short
as any relays could make them. No single visit may exceed the room.
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
CUTS: Floats = np.array([float(cut) for cut in _CUTS])  # shares at which one of the roundings steps up
ROUNDED: Floats = np.array([[cut * m // 1 / (m - 1) for cut in _CUTS] for m in PARTS])  # [parts, cuts]: from there on


@dataclass(frozen=True, slots=True)
class VisitTable:
    """What can follow in one visit, independent of prices; index e of a prefix covers layers 0..e-1."""

    problem: AssignmentProblem
    cost: Floats  # [devices, layers + 1] prefix; a layer that may not lie there counts nothing, `far` ends before it
    memory: Ints  # [devices, layers + 1] prefix
    far: Ints  # [devices, layers]: the last layer that one visit starting at i can hold (i - 1: none)
    runs: LayerRuns
    entered: Ints  # [priced runs]: the first layer of each
    unit: Floats  # [devices]: bytes of which shares are counted, one more than the room
    largest_share: Floats  # [devices]: the share that may be taken
    # Of the visit from each layer on that has so many more behind it:
    visit_cost: Floats  # [devices, layers, more]: cost, infinite where it cannot be
    share: Floats  # [devices, layers, more]
    step: Ints  # [devices, layers, more]: the last of CUTS that the share reaches
    enters: Floats  # [priced runs, layers, more]: 1 if some of it lies in the run

    @property
    def prices(self) -> tuple[int, int]:
        """How many there are: (kinds, devices)."""
        return len(PARTS) + 2 + len(self.entered), len(self.unit)


def visit_table(problem: AssignmentProblem, runs: LayerRuns) -> VisitTable:
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
    """The last of CUTS that each share reaches."""
    step: Ints = np.searchsorted(CUTS, share, side="right") - 1
    return step


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """Under prices, none of them negative; costs are infinite where no way leads on."""

    price: Floats  # [kinds, devices]
    share: Floats  # [devices]: price of the whole of `Visits.unit`
    steps: Floats  # [devices, cuts]: of the rounded shares, from each of CUTS on
    discount: Floats  # [devices]: what each visit is let off
    run_price: Floats  # [priced runs, devices]: of a visit to the run, which everyone is given back once
    charged: Floats  # [devices, layers, more]: what visits cost
    visit: Floats  # [layers + 1, devices]: from starting a visit at layer i until home
    leave: Floats  # [devices, layers]: from leaving a device after layer i until home
    value: float  # the bound on any way

    def refund(self, share: Floats) -> Floats:
        """[labels]: the most that visits within a `share` [labels, devices] of each device could be charged.

        Of any number of visits at least one pays its toll back. Visits to runs come on top.
        """
        return self.refunds(share, np.arange(len(self.share))).sum(axis=-1)  # type: ignore[no-any-return]

    def refunds(self, share: Floats, device: Ints) -> Floats:
        """The same of single devices."""
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
    """A cheapest relaxed way as (device, last layer) of each visit; call only where `value` is finite."""
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
    """[kinds, devices]: how far `way` goes beyond what its prices stand for; whether it keeps to all rooms."""
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
    )  # back, if the device is left alone
    use[0] -= table.largest_share * given
    use[1 : 1 + len(PARTS)] -= ROUNDED[:, step_of(table.largest_share)] * given
    use[1 + len(PARTS)] += given
    use[2 + len(PARTS) :] -= 1
    return use, bool((used <= table.problem.room).all())


def initial_memory_price(table: VisitTable) -> Floats:
    """[kinds, devices]: what a share is worth if layers simply fill the fastest devices first: a start."""
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
