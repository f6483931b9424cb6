"""The latency objective as numbers: layers × devices, what each costs and weighs, and the hops between."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from peerllm.planner.arrays import Floats, Ints

DeviceRoute = list[tuple[int, int]]  # (device, last layer) of each visit


@dataclass(frozen=True, slots=True)
class AssignmentProblem:
    """Layers 0 and 1 lie on device 0, where the way starts and ends. No cost is negative; an infinite one means that a
    layer may not lie there, or that there is no link."""

    cost: Floats  # [layers, devices]
    hop: Floats  # [layers, devices, devices]: from layer i on k to the next layer on j
    back: Floats  # [devices]: from the last layer to the start
    memory: Ints  # [layers, devices]
    room: Ints  # [devices]


def placement_cost(problem: AssignmentProblem, placement: tuple[int, ...]) -> float:
    """What a full assignment costs, limits aside."""
    total = float(problem.back[placement[-1]]) + sum(float(problem.cost[i, j]) for i, j in enumerate(placement))
    return total + sum(float(problem.hop[i, a, b]) for i, (a, b) in enumerate(pairwise(placement)))


def interchangeable_devices(problem: AssignmentProblem) -> Ints:
    """For each device the nearest earlier one it could be swapped with unnoticed, or -1: the first comes first."""
    devices = len(problem.room)
    twins = np.full(devices, -1, dtype=np.int64)
    marks = [
        (int(problem.room[j]), problem.cost[:, j].tobytes(), problem.memory[:, j].tobytes(), float(problem.back[j]))
        for j in range(devices)
    ]
    for j in range(2, devices):
        for k in range(j - 1, 0, -1):
            if marks[j] == marks[k] and _same_hops(problem.hop, j, k):
                twins[j] = k
                break
    return twins


def _same_hops(hop: Floats, j: int, k: int) -> bool:
    others = np.ones(hop.shape[1], dtype=bool)
    others[[j, k]] = False
    same = np.array_equal(hop[:, j, others], hop[:, k, others]) and np.array_equal(hop[:, others, j], hop[:, others, k])
    return bool(same and np.array_equal(hop[:, j, k], hop[:, k, j]))
