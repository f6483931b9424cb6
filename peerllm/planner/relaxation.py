"""Lower bounds for the search: memory limits become prices, but no single visit of a device may exceed its room.

The price alone would let one device take every layer at no hop; bounding each visit makes the relaxed way pay for the
hops that the limits force.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SUBGRADIENT_STEPS = 40
PATIENCE = 5  # steps without a better bound before the pace is halved
TOLERANCE = 1e-10  # relative; two costs closer than this are one


@dataclass(frozen=True, slots=True)
class Problem:
    """Device 0 is where the way starts and ends. Infinite cost means that a layer may not lie there."""

    cost: Floats  # [layers, devices]
    hop: Floats  # [layers, devices, devices]: from layer i on k to the next layer on j
    back: Floats  # [devices]: from the last layer to the start
    memory: Ints  # [layers, devices]
    room: Ints  # [devices]


@dataclass(frozen=True, slots=True)
class Sums:
    """Of a problem, independent of prices; index e of a prefix covers layers 0..e-1."""

    memory: Ints  # [devices, layers + 1] prefix
    allowed: Ints  # [layers + 1, devices]: the last layer of the run of allowed ones that starts at i (i - 1: none)
    reach: Ints  # [layers, devices]: the last layer that one visit starting at i can hold


def sums(problem: Problem) -> Sums:
    layers, devices = problem.cost.shape
    memory = np.zeros((devices, layers + 1), dtype=np.int64)
    memory[:, 1:] = problem.memory.cumsum(axis=0).T
    allowed = np.full((layers + 1, devices), layers - 1, dtype=np.int64)
    for i in range(layers - 1, -1, -1):
        allowed[i] = np.where(np.isfinite(problem.cost[i]), allowed[i + 1], i - 1)
    reach = np.empty((layers, devices), dtype=np.int64)
    for j in range(devices):
        held = np.searchsorted(memory[j], memory[j, :layers] + problem.room[j], side="right") - 2
        reach[:, j] = np.minimum(held, allowed[:layers, j])
    return Sums(memory, allowed, reach)


@dataclass(frozen=True, slots=True)
class Bound:
    """Relaxed costs under one set of prices."""

    price: Floats  # [devices]: per byte
    prefix: Floats  # [devices, layers + 1]: priced cost of layers 0..e-1
    leaving: Floats  # [devices, layers]: prefix through layer e plus the relaxed cost after leaving there
    visits: Floats  # [layers, devices]: relaxed cost of all that follows from a visit starting at layer i

    def togo(self, totals: Sums, layer: int, device: Ints, left: Ints) -> Floats:
        """Relaxed cost after `layer` on `device`, of which `left` bytes remain, less the worth of nothing."""
        stay = np.minimum.accumulate(self.leaving[:, layer:], axis=1)
        cost = np.empty(len(device))
        for j in range(len(self.price)):
            mine = device == j
            end = np.searchsorted(totals.memory[j], totals.memory[j, layer + 1] + left[mine], side="right") - 2
            end = np.minimum(end, totals.allowed[layer + 1, j])
            cost[mine] = stay[j, end - layer] - self.prefix[j, layer + 1]
        return cost


def bound(problem: Problem, totals: Sums, price: Floats) -> Bound:
    layers, devices = problem.cost.shape
    finite = np.where(np.isfinite(problem.cost), problem.cost, 0.0) + problem.memory * price
    prefix = np.zeros((devices, layers + 1))
    prefix[:, 1:] = finite.cumsum(axis=0).T
    leaving = np.full((devices, layers), np.inf)
    leaving[:, -1] = prefix[:, -1] + problem.back
    visits = np.empty((layers, devices))
    other = np.where(np.eye(devices, dtype=bool), np.inf, 0.0)
    ends = np.arange(layers)
    for i in range(layers - 1, -1, -1):
        held = np.where(ends[i:] <= totals.reach[i][:, None], leaving[:, i:], np.inf)
        visits[i] = held.min(axis=1) - prefix[:, i]
        if i:
            leaving[:, i - 1] = prefix[:, i] + (problem.hop[i - 1] + other + visits[i]).min(axis=1)
    return Bound(price, prefix, leaving, visits)


def relaxed_way(problem: Problem, totals: Sums, held: Bound) -> tuple[int, ...]:
    """The relaxed optimum itself: a device per layer, limits kept only within each visit."""
    layers = len(problem.cost)
    way: list[int] = []
    device = 0
    while True:
        i = len(way)
        end = i + int(held.leaving[device, i : totals.reach[i, device] + 1].argmin())
        way += [device] * (end + 1 - i)
        if end == layers - 1:
            return tuple(way)
        onward = problem.hop[end, device] + held.visits[end + 1]
        onward[device] = np.inf
        device = int(onward.argmin())


def way_cost(problem: Problem, homes: tuple[int, ...]) -> float:
    """What a full assignment costs, limits aside."""
    total = float(problem.back[homes[-1]]) + sum(float(problem.cost[i, j]) for i, j in enumerate(homes))
    return total + sum(float(problem.hop[i, a, b]) for i, (a, b) in enumerate(pairwise(homes)))


def fair_price(problem: Problem) -> Floats:
    """What a byte of each device is worth if layers simply fill the fastest devices first: a start for the prices."""
    finite = np.where(np.isfinite(problem.cost), problem.cost, 0.0)
    pace = finite.sum(axis=0) / np.maximum(problem.memory.sum(axis=0), 1)
    left, dearest = int(problem.memory.min(axis=1).sum()), 0.0
    for device in np.argsort(pace):
        dearest = float(pace[device])
        left -= int(problem.room[device])
        if left <= 0:
            break
    price: Floats = np.maximum(0.0, dearest - pace)
    return price


def relax(
    problem: Problem, totals: Sums, start: Floats, best: float, homes: tuple[int, ...]
) -> tuple[Bound, float, tuple[int, ...]]:
    """Subgradient ascent from `start`: the best bound met, and the best way met that respects every limit."""
    layers, devices = problem.cost.shape
    place = np.arange(layers)
    free = np.minimum(problem.room, problem.memory.sum(axis=0))
    scale = float(max(problem.memory.sum(axis=0).max(), 1))
    price, top, pace, idle = start, -np.inf, 1.0, 0
    kept = bound(problem, totals, start)
    for _ in range(SUBGRADIENT_STEPS):
        held = bound(problem, totals, price)
        value = float(held.visits[0, 0] - (price * free).sum())
        if not np.isfinite(value):
            break  # no way at all, at any price
        way = relaxed_way(problem, totals, held)
        used = np.bincount(way, weights=problem.memory[place, way], minlength=devices)
        if (used <= problem.room).all():
            cost = way_cost(problem, way)
            if cost < best:
                best, homes = cost, way
        if value > top:
            top, kept, idle = value, held, 0
        else:
            idle += 1
            if idle == PATIENCE:
                idle, pace, price = 0, pace / 2, kept.price
                continue
        slope = (used - free) / scale
        norm = float((slope * slope).sum())
        gap = (best if np.isfinite(best) else value + 0.1 * abs(value) + 1e-9) - value
        if norm == 0 or gap <= TOLERANCE * abs(value):
            break
        price = np.maximum(0.0, price + pace * gap / norm * slope / scale)
    return kept, best, homes
