"""Lower bounds for the latency search: memory limits become prices (Lagrangian relaxation).

A way is a chain of visits. Priced are every byte of a device and every long visit, one that takes more than half of the
device's room, of which there can be only one; and every visit is let off a toll, because who leaves a device alone is
given back the price of its room less one toll. No single visit may exceed the room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Problem:
    """Device 0 is where the way starts and ends. Infinite cost means that a layer may not lie there."""

    cost: Floats  # [layers, devices]
    hop: Floats  # [layers, devices, devices]: from layer i on k to the next layer on j
    back: Floats  # [devices]: from the last layer to the start
    memory: Ints  # [layers, devices]
    room: Ints  # [devices]


@dataclass(frozen=True, slots=True)
class Visits:
    """What can follow in one visit, independent of prices; index e of a prefix covers layers 0..e-1."""

    problem: Problem
    cost: Floats  # [devices, layers + 1] prefix; a layer that may not lie there counts nothing, `far` ends before it
    memory: Ints  # [devices, layers + 1] prefix
    far: Ints  # [devices, layers]: the last layer that one visit starting at i can hold (i - 1: none)
    long: Ints  # [devices, layers]: the first end with which that visit is a long one
    hop: Floats  # [layers, devices, devices]: infinite to the device itself: staying is no hop
    room: Ints  # [devices]: no more than the whole model would take
    after: Ints  # [layers, devices]: memory of all layers behind this one
    width: int  # layers of the longest visit


def visits_of(problem: Problem) -> Visits:
    layers, devices = problem.cost.shape
    finite = np.isfinite(problem.cost)
    cost = np.zeros((devices, layers + 1))
    cost[:, 1:] = np.where(finite, problem.cost, 0.0).cumsum(axis=0).T
    memory = np.zeros((devices, layers + 1), dtype=np.int64)
    memory[:, 1:] = problem.memory.cumsum(axis=0).T
    allowed = np.full((layers + 1, devices), layers - 1, dtype=np.int64)
    for i in range(layers - 1, -1, -1):
        allowed[i] = np.where(finite[i], allowed[i + 1], i - 1)
    far, long = np.empty((2, devices, layers), dtype=np.int64)
    for j in range(devices):
        start = memory[j, :layers]
        far[j] = np.searchsorted(memory[j], start + problem.room[j], side="right") - 2
        long[j] = np.searchsorted(memory[j], start + problem.room[j] // 2, side="right") - 1
    far = np.maximum(np.minimum(far, allowed[:layers].T), np.arange(layers) - 1)
    hop = problem.hop + np.where(np.eye(devices, dtype=bool), np.inf, 0.0)
    total = memory[:, -1]
    after = total - memory[:, 1:].T
    width = max(1, int((far - np.arange(layers)).max()) + 1)
    return Visits(problem, cost, memory, far, long, hop, np.minimum(problem.room, total), after, width)


@dataclass(frozen=True, slots=True)
class Relaxed:
    """Under prices; costs are infinite where no way leads on."""

    byte: Floats  # [devices]: price of a byte
    long: Floats  # [devices]: price of a long visit
    toll: Floats  # [devices]: what each visit is let off
    visit: Floats  # [layers + 1, devices]: from starting a visit at layer i until home, prices included
    leave: Floats  # [devices, layers]: from leaving a device after layer i until home
    value: float  # the bound on any way

    def refund(self, useful: Ints, room: Ints) -> Floats:
        """[labels]: the most that visits within `useful` bytes [labels, devices] of each device could be charged.

        Of any number of visits at least one pays its toll back: sum(byte·x + long - toll) <= byte·useful + long - toll.
        """
        charged = useful * self.byte + np.where(2 * useful > room, self.long, 0.0) - self.toll
        total: Floats = np.maximum(charged, 0.0).sum(axis=-1)
        return total


def relaxed(held: Visits, byte: Floats, long: Floats, toll: Floats) -> Relaxed:
    """The bound under these prices, by dynamic programming from the last layer back."""
    devices, layers = held.far.shape
    prefix = held.cost + held.memory * byte[:, None]
    visit = np.full((layers + 1, devices), np.inf)
    leave = np.full((devices, layers), np.inf)
    ending = np.full((devices, layers), np.inf)  # prefix up to and with a layer, plus what follows
    leave[:, -1] = held.problem.back
    ends = np.arange(layers)
    for i in range(layers - 1, -1, -1):
        if i < layers - 1:
            leave[:, i] = (held.hop[i] + visit[i + 1]).min(axis=1)
        ending[:, i] = prefix[:, i + 1] + leave[:, i]
        until = ends[i : i + held.width]
        window = np.where(until <= held.far[:, i, None], ending[:, i : i + held.width], np.inf)
        window += np.where(until >= held.long[:, i, None], long[:, None], 0.0)
        visit[i] = window.min(axis=1) - prefix[:, i] - toll
    found = Relaxed(byte, long, toll, visit, leave, 0.0)
    return replace(found, value=float(visit[0, 0] - found.refund(held.room, held.problem.room)))


def relaxed_way(held: Visits, found: Relaxed) -> list[tuple[int, int]]:
    """A cheapest relaxed way as (device, last layer) of each visit; call only where `value` is finite."""
    layers = held.far.shape[1]
    way: list[tuple[int, int]] = []
    device, start = 0, 0
    while True:
        stop = held.far[device, start] + 1
        cost = held.cost[device, start + 1 : stop + 1] + held.memory[device, start + 1 : stop + 1] * found.byte[device]
        cost = cost + found.leave[device, start:stop]
        cost[max(0, held.long[device, start] - start) :] += found.long[device]
        end = start + int(cost.argmin())
        way.append((device, end))
        if end == layers - 1:
            return way
        start = end + 1
        device = int((held.hop[end, device] + found.visit[start]).argmin())


def usage(held: Visits, way: list[tuple[int, int]]) -> tuple[Floats, Floats, Floats]:
    """(bytes, long visits, visits) of each device."""
    used, long, count = np.zeros((3, len(held.room)))
    start = 0
    for device, end in way:
        used[device] += held.memory[device, end + 1] - held.memory[device, start]
        long[device] += end >= held.long[device, start]
        count[device] += 1
        start = end + 1
    return used, long, count


def way_cost(problem: Problem, homes: tuple[int, ...]) -> float:
    """What a full assignment costs, limits aside."""
    total = float(problem.back[homes[-1]]) + sum(float(problem.cost[i, j]) for i, j in enumerate(homes))
    return total + sum(float(problem.hop[i, a, b]) for i, (a, b) in enumerate(pairwise(homes)))


def spread(way: list[tuple[int, int]]) -> tuple[int, ...]:
    """A device per layer."""
    homes: list[int] = []
    for device, end in way:
        homes += [device] * (end + 1 - len(homes))
    return tuple(homes)


def fair_price(held: Visits) -> Floats:
    """What a byte of each device is worth if layers simply fill the fastest devices first: a start for the prices."""
    problem = held.problem
    pace = held.cost[:, -1] / np.maximum(held.memory[:, -1], 1)
    left, dearest = int(problem.memory.min(axis=1).sum()), 0.0
    for device in np.argsort(pace):
        dearest = float(pace[device])
        left -= int(held.room[device])
        if left <= 0:
            break
    price: Floats = np.where(held.room > 0, np.maximum(0.0, dearest - pace), 0.0)
    return price
