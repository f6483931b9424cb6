"""Partial ways swept layer by layer under a goal: exact if nothing is left out, else a good way among the hopeful."""

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

WORK_PER_LAYER, WORK_PER_VISIT = 3000, 1000  # what a call costs besides its elements, counted in elements
WAITING_LABELS = 6  # times the labels that are gone on with may wait for a layer before the hopeless go

_NewVisits = tuple[Ints, Ints, Floats]  # of visits: the label's row, the device, the cost before


class LabelSetting:
    """One pass over the layers.

    `work` is what it took, `reached` the last layer that found a place, `cost` that of the way found, and `whole` says
    whether nothing was left out.
    """

    def __init__(self, held: VisitTable, fillings: UsableMemory, found: MemoryBound, goal: float, twins: Ints) -> None:
        """`twins`: for each device the nearest earlier one like it, which must be used first, or -1."""
        self.work, self.reached, self.whole, self.cost = 0, -1, True, np.inf
        self._held, self._fillings, self._found, self._goal, self._twins = held, fillings, found, goal, twins
        self._alike = Dominance(len(twins))
        self._waiting: dict[int, list[Labels]] = {}  # by the last layer of their visit
        self._crowd: Counter[int] = Counter()  # how many these are
        self._width = 0
        self._trail: list[tuple[int, Ints, Ints]] = []  # last layer, devices, rows before: of the labels kept
        self._starts = [0]  # the first row of each part of the trail, and of the next
        need = held.problem.memory.min(axis=1)
        self._behind, self._weighing = (x[::-1].cumsum()[::-1] - x for x in (need, (need > 0).astype(np.int64)))
        self._smallest = int(need[need > 0].min(initial=2**62))
        self._later = np.array([found.again[held.entered > i].sum() for i in range(len(need))])

    def run(self, width: int, budget: float = np.inf) -> DeviceRoute | None:
        """A way of cost at most the goal, from `width` labels a layer: if `whole`, the cheapest, or there is none.

        Gives up, and is not `whole`, once its `work` is more than the `budget`.
        """
        self._width = width
        problem, last = self._held.problem, len(self._held.problem.cost) - 1
        if problem.room[0] < 0:
            return None
        none, zero = np.zeros((1, len(problem.room)), dtype=bool), np.zeros(1, np.int64)
        start = Labels(zero, problem.room[None].clip(0), none, none, none, np.zeros(1), zero - 1)
        refund, again = self._found.refund(start.left / self._held.unit), self._found.again.sum() + np.zeros(1)
        self._grow(0, start, (zero, zero, np.zeros(1)), refund, again)
        for i in range(last + 1):
            parts = self._waiting.pop(i, [])
            if not parts:
                continue
            if self.work > budget:
                self.whole = False
                return None
            labels, refund, again = self._kept(Labels.joined(parts), i)
            if not len(labels.device):
                continue
            self.reached = i
            self._trail.append((i, labels.device, labels.parent))
            if i == last:
                total = labels.cost + problem.back[labels.device]
                best = int(total.argmin())
                self.cost = float(total[best])
                return self._way(best) if total[best] <= self._goal else None
            self._go_on(labels, i, refund, again)
            self._starts.append(self._starts[-1] + len(labels.device))
        return None

    def _kept(self, labels: Labels, i: int) -> tuple[Labels, Floats, Floats]:
        """Those within the goal that no other makes needless, `width` at most, and what each may get back."""
        held, end = self._held, int(self._held.runs.last[i])
        self.work += 30 * labels.left.size
        useful = self._fillings.useful(labels.left, i)
        if i < end:
            useful = np.where(labels.been, self._fillings.useful(labels.left, end), useful)
        labels = replace(labels, left=useful)
        refund = self._found.refund(useful / held.unit)
        again = np.full(len(useful), self._later[i])
        good = (useful.sum(axis=1) >= self._behind[i]) & ((useful // self._smallest).sum(axis=1) >= self._weighing[i])
        if i < end:
            size = held.problem.memory[end]
            holds = np.where(labels.been, 0, np.where(size > 0, useful // np.maximum(size, 1), end - i))
            good &= holds.sum(axis=1) >= end - i
            if held.runs.priced[i] >= 0:
                again += (holds > 0) @ self._found.again[held.runs.priced[i]]
        value = labels.cost + self._found.leave[labels.device, i] - refund - again
        rows = np.flatnonzero(good & (value <= self._goal) & np.isfinite(value))
        if len(rows):
            rows = rows[self._alike.cheapest(labels.at(rows))]
        if len(rows) > self._width:
            self.whole = False
            rows = rows[np.argpartition(value[rows], self._width)[: self._width]]
        return labels.at(rows), refund[rows], again[rows]

    def _go_on(self, labels: Labels, i: int, refund: Floats, again: Floats) -> None:
        """From labels at layer i to wherever the next visit may begin."""
        held, problem = self._held, self._held.problem
        self.work += WORK_PER_LAYER + labels.left.size * 4
        hop, touched = relayed_hops(problem, held.runs, i, labels.device, labels.ready)
        self.work += touched
        into = labels.cost[:, None] + hop
        good = into + self._found.visit[i + 1] <= (self._goal + refund + again)[:, None]
        good &= (labels.left >= problem.memory[i + 1]) & ~labels.been
        good &= np.isfinite(into)
        good &= (self._twins < 0) | labels.used[:, np.maximum(self._twins, 0)]
        row, target = np.nonzero(good)
        self._grow(i + 1, labels, (row, target, into[row, target]), refund, again)

    def _grow(self, start: int, labels: Labels, begun: _NewVisits, refund: Floats, again: Floats) -> None:
        """Visits from layer `start` on; `refund` and `again` are what each label may get back."""
        held, found, runs = self._held, self._found, self._held.runs
        row, target, cost = begun
        unit = held.unit[target]
        spare = labels.left[row, target]
        cost = cost - held.cost[target, start]
        far = held.far[target, start]

        allowed = self._goal + refund[row] - found.refunds(spare / unit, target)
        total = labels.left.sum(axis=1)[row]
        for end in range(start, int(far.max(initial=start - 1)) + 1):
            self.work += WORK_PER_VISIT + 10 * len(row)
            first, number = int(runs.first[end]), int(runs.priced[end])
            within = first < start  # the run had begun before
            back: Floats | float = self._later[end]
            if end < runs.last[end] and number >= 0:
                back = (again[row] if within else back + found.again[number].sum()) - found.again[number, target]
            taken = held.memory[target, end + 1] - held.memory[target, start]
            value = cost + held.cost[target, end + 1]
            good = (far >= end) & (taken <= spare) & (total - taken >= self._behind[end])
            good &= value + found.leave[target, end] - found.refunds((spare - taken) / unit, target) - back <= allowed
            keep = np.flatnonzero(good)
            if not len(keep):
                continue
            self.work += 10 * len(keep) * len(held.unit)
            rows, devices, each = row[keep], target[keep], np.arange(len(keep))
            left, used = labels.left[rows], labels.used[rows]
            left[each, devices] -= taken[keep]
            used[each, devices] = True
            been, ready = np.zeros((2, *used.shape), dtype=bool)
            if within:
                been, ready = labels.been[rows], labels.ready[rows]
            if end < runs.last[end]:
                been[each, devices] = True
            else:
                been = np.zeros_like(used)
            ready[each, devices] = runs.relay[end, devices] & (end > max(start, first))
            parent = self._starts[-1] + rows if start else rows - 1
            self._wait(end, Labels(devices, left, used, been, ready, value[keep], parent))

    def _wait(self, end: int, labels: Labels) -> None:
        parts = self._waiting.setdefault(end, [])
        parts.append(labels)
        self._crowd[end] += len(labels.device)
        if self._crowd[end] > WAITING_LABELS * self._width:
            parts[:] = [self._kept(Labels.joined(parts), end)[0]]
            self._crowd[end] = len(parts[0].device)

    def _way(self, row: int) -> DeviceRoute:
        way: DeviceRoute = []
        row += self._starts[-1]
        while row >= 0:
            part = bisect_right(self._starts, row) - 1
            end, device, parent = self._trail[part]
            way.append((int(device[row - self._starts[part]]), end))
            row = int(parent[row - self._starts[part]])
        return way[::-1]
