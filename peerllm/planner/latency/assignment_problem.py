"""The latency objective as arrays: what each layer costs and weighs on each device, and the hops between."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from peerllm.planner.arrays import Floats, Ints

DeviceRoute = list[tuple[int, int]]  # (device, last layer) of each visit


@dataclass(frozen=True, slots=True)
class AssignmentProblem:
    """Assign a device to every layer. Layers 0 and 1 lie on device 0, where the route starts and ends.

    No cost is negative. An infinite one means that a layer may not lie there, or that there is no link.
    """

    cost: Floats  # [layers, devices]
    hop: Floats  # [layers, from, to]: after layer i
    back: Floats  # [devices]: from the last layer back to device 0
    memory: Ints  # [layers, devices]
    room: Ints  # [devices]


def placement_cost(problem: AssignmentProblem, placement: tuple[int, ...]) -> float:
    """The cost of a device for each layer; memory limits are not checked."""
    total = float(problem.back[placement[-1]]) + sum(float(problem.cost[i, j]) for i, j in enumerate(placement))
    return total + sum(float(problem.hop[i, a, b]) for i, (a, b) in enumerate(pairwise(placement)))


def interchangeable_devices(problem: AssignmentProblem) -> Ints:
    """For each device the nearest earlier one that could be swapped with it without changing any cost, or -1.

    Searches use the earlier one first, which halves the symmetric solutions.
    """
    devices = len(problem.room)
    earlier = np.full(devices, -1, dtype=np.int64)
    marks = [
        (int(problem.room[j]), problem.cost[:, j].tobytes(), problem.memory[:, j].tobytes(), float(problem.back[j]))
        for j in range(devices)
    ]
    for j in range(2, devices):
        for k in range(j - 1, 0, -1):
            if marks[j] == marks[k] and _same_hops(problem.hop, j, k):
                earlier[j] = k
                break
    return earlier


def _same_hops(hop: Floats, j: int, k: int) -> bool:
    others = np.ones(hop.shape[1], dtype=bool)
    others[[j, k]] = False
    same = np.array_equal(hop[:, j, others], hop[:, k, others]) and np.array_equal(hop[:, others, j], hop[:, others, k])
    return bool(same and np.array_equal(hop[:, j, k], hop[:, k, j]))
