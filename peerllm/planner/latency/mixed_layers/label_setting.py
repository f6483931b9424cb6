"""Label setting layer by layer: the cheapest route below a cutoff if no label is dropped, else a good one."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import replace

import numpy as np

from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.latency.assignment_problem import DeviceRoute
from peerllm.planner.latency.mixed_layers.labels import Dominance, Labels
from peerllm.planner.latency.mixed_layers.memory_relaxation import MemoryBound, VisitTable
from peerllm.planner.latency.mixed_layers.relay_hops import relayed_hops
from peerllm.planner.latency.mixed_layers.usable_memory import UsableMemory

WORK_PER_LAYER, WORK_PER_VISIT = 3000, 1000  # overhead of a numpy call, in array elements
WAITING_LABELS = 6  # times the width may wait for a layer before they are pruned early

_NewVisits = tuple[Ints, Ints, Floats]  # the label's row, the device, the cost before the visit


class LabelSetting:
    """One pass over the layers.

    `work` counts array elements touched, `reached` is the last layer placed, `cost` that of the route found, and
    `complete` says that no label was dropped.
    """

    def __init__(
        self, table: VisitTable, usable_memory: UsableMemory, relaxed: MemoryBound, cutoff: float, interchangeable: Ints
    ) -> None:
        """`interchangeable`: for each device the earlier equal one, which must be used first, or -1."""
        self.work, self.reached, self.complete, self.cost = 0, -1, True, np.inf
        self._table, self._usable_memory, self._relaxed = table, usable_memory, relaxed
        self._cutoff, self._interchangeable = cutoff, interchangeable
        self._dominance = Dominance(len(interchangeable))
        self._waiting: dict[int, list[Labels]] = {}  # by the last layer of the visit
        self._waiting_count: Counter[int] = Counter()  # of labels
        self._width = 0
        self._trail: list[tuple[int, Ints, Ints]] = []  # of labels kept: last layer, devices, parent rows
        self._trail_starts = [0]  # the first row of each part of the trail, and of the next part
        need = table.problem.memory.min(axis=1)
        self._bytes_after, self._weighty_after = (
            x[::-1].cumsum()[::-1] - x for x in (need, (need > 0).astype(np.int64))
        )
        self._smallest = int(need[need > 0].min(initial=2**62))
        self._later_run_price = np.array([relaxed.run_price[table.entered > i].sum() for i in range(len(need))])

    def run(self, width: int, budget: float = np.inf) -> DeviceRoute | None:
        """A route of cost at most the cutoff, from `width` labels per layer.

        If `complete`, it is the cheapest, or there is none. Once `work` exceeds the `budget` the pass gives up.
        """
        self._width = width
        problem, last = self._table.problem, len(self._table.problem.cost) - 1
        if problem.room[0] < 0:
            return None
        none, zero = np.zeros((1, len(problem.room)), dtype=bool), np.zeros(1, np.int64)
        start = Labels(zero, problem.room[None].clip(0), none, none, none, np.zeros(1), zero - 1)
        refund = self._relaxed.refund(start.left / self._table.unit)
        run_refund = self._relaxed.run_price.sum() + np.zeros(1)
        self._add_visits(0, start, (zero, zero, np.zeros(1)), refund, run_refund)
        for i in range(last + 1):
            parts = self._waiting.pop(i, [])
            if not parts:
                continue
            if self.work > budget:
                self.complete = False
                return None
            labels, refund, run_refund = self._prune(Labels.joined(parts), i)
            if not len(labels.device):
                continue
            self.reached = i
            self._trail.append((i, labels.device, labels.parent))
            if i == last:
                total = labels.cost + problem.back[labels.device]
                best = int(total.argmin())
                self.cost = float(total[best])
                return self._route(best) if total[best] <= self._cutoff else None
            self._extend(labels, i, refund, run_refund)
            self._trail_starts.append(self._trail_starts[-1] + len(labels.device))
        return None

    def _prune(self, labels: Labels, i: int) -> tuple[Labels, Floats, Floats]:
        """(undominated labels within the cutoff, at most the width; what memory and runs may refund to each)."""
        table, end = self._table, int(self._table.runs.last[i])
        self.work += 30 * labels.left.size
        usable = self._usable_memory.usable(labels.left, i)
        if i < end:
            usable = np.where(labels.visited, self._usable_memory.usable(labels.left, end), usable)
        labels = replace(labels, left=usable)
        refund = self._relaxed.refund(usable / table.unit)
        run_refund = np.full(len(usable), self._later_run_price[i])
        good = (usable.sum(axis=1) >= self._bytes_after[i]) & (
            (usable // self._smallest).sum(axis=1) >= self._weighty_after[i]
        )
        if i < end:
            size = table.problem.memory[end]
            holds = np.where(labels.visited, 0, np.where(size > 0, usable // np.maximum(size, 1), end - i))
            good &= holds.sum(axis=1) >= end - i
            if table.runs.priced[i] >= 0:
                run_refund += (holds > 0) @ self._relaxed.run_price[table.runs.priced[i]]
        value = labels.cost + self._relaxed.leave[labels.device, i] - refund - run_refund
        rows = np.flatnonzero(good & (value <= self._cutoff) & np.isfinite(value))
        if len(rows):
            rows = rows[self._dominance.undominated(labels.at(rows))]
        if len(rows) > self._width:
            self.complete = False
            rows = rows[np.argpartition(value[rows], self._width)[: self._width]]
        return labels.at(rows), refund[rows], run_refund[rows]

    def _extend(self, labels: Labels, i: int, refund: Floats, run_refund: Floats) -> None:
        """Start the next visits from labels at layer i."""
        table, problem = self._table, self._table.problem
        self.work += WORK_PER_LAYER + labels.left.size * 4
        hop, touched = relayed_hops(problem, table.runs, i, labels.device, labels.available)
        self.work += touched
        into = labels.cost[:, None] + hop
        good = into + self._relaxed.visit[i + 1] <= (self._cutoff + refund + run_refund)[:, None]
        good &= (labels.left >= problem.memory[i + 1]) & ~labels.visited
        good &= np.isfinite(into)
        good &= (self._interchangeable < 0) | labels.used[:, np.maximum(self._interchangeable, 0)]
        row, target = np.nonzero(good)
        self._add_visits(i + 1, labels, (row, target, into[row, target]), refund, run_refund)

    def _add_visits(self, start: int, labels: Labels, begun: _NewVisits, refund: Floats, run_refund: Floats) -> None:
        """Visits that begin at layer `start`; `refund` and `run_refund` are the most each label may get back."""
        table, relaxed, runs = self._table, self._relaxed, self._table.runs
        row, target, cost = begun
        unit = table.unit[target]
        spare = labels.left[row, target]
        cost = cost - table.cost[target, start]
        far = table.far[target, start]

        allowed = self._cutoff + refund[row] - relaxed.refunds(spare / unit, target)
        total = labels.left.sum(axis=1)[row]
        for end in range(start, int(far.max(initial=start - 1)) + 1):
            self.work += WORK_PER_VISIT + 10 * len(row)
            first, number = int(runs.first[end]), int(runs.priced[end])
            within = first < start  # the run began before this visit
            back: Floats | float = self._later_run_price[end]
            if end < runs.last[end] and number >= 0:
                back = (run_refund[row] if within else back + relaxed.run_price[number].sum()) - relaxed.run_price[
                    number, target
                ]
            taken = table.memory[target, end + 1] - table.memory[target, start]
            value = cost + table.cost[target, end + 1]
            good = (far >= end) & (taken <= spare) & (total - taken >= self._bytes_after[end])
            good &= (
                value + relaxed.leave[target, end] - relaxed.refunds((spare - taken) / unit, target) - back <= allowed
            )
            keep = np.flatnonzero(good)
            if not len(keep):
                continue
            self.work += 10 * len(keep) * len(table.unit)
            rows, devices, each = row[keep], target[keep], np.arange(len(keep))
            left, used = labels.left[rows], labels.used[rows]
            left[each, devices] -= taken[keep]
            used[each, devices] = True
            visited, available = np.zeros((2, *used.shape), dtype=bool)
            if within:
                visited, available = labels.visited[rows], labels.available[rows]
            if end < runs.last[end]:
                visited[each, devices] = True
            else:
                visited = np.zeros_like(used)
            available[each, devices] = runs.relay[end, devices] & (end > max(start, first))
            parent = self._trail_starts[-1] + rows if start else rows - 1
            self._enqueue(end, Labels(devices, left, used, visited, available, value[keep], parent))

    def _enqueue(self, end: int, labels: Labels) -> None:
        """Let labels wait for their last layer; prune them early where too many wait."""
        parts = self._waiting.setdefault(end, [])
        parts.append(labels)
        self._waiting_count[end] += len(labels.device)
        if self._waiting_count[end] > WAITING_LABELS * self._width:
            parts[:] = [self._prune(Labels.joined(parts), end)[0]]
            self._waiting_count[end] = len(parts[0].device)

    def _route(self, row: int) -> DeviceRoute:
        """The route that ends in a label of the last layer."""
        route: DeviceRoute = []
        row += self._trail_starts[-1]
        while row >= 0:
            part = bisect_right(self._trail_starts, row) - 1
            end, device, parent = self._trail[part]
            route.append((int(device[row - self._trail_starts[part]]), end))
            row = int(parent[row - self._trail_starts[part]])
        return route[::-1]
