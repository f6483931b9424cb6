"""How much of a device's room the later layers could fill: labels that differ only in unusable room are equivalent."""

from __future__ import annotations

import numpy as np

from peerllm.planner.arrays import Ints
from peerllm.planner.latency.assignment_problem import AssignmentProblem

MOST_SUMS = 4096  # sums kept for one layer; where there are more, only the sum of all later layers counts


class UsableMemory:
    """The sums of bytes that some of the layers after each layer take together."""

    def __init__(self, problem: AssignmentProblem) -> None:
        memory, most = problem.memory, int(problem.room.max(initial=0))
        columns, which = np.unique(memory, axis=1, return_inverse=True)
        self._sums = [_sums(column, most) for column in columns.T]
        self._devices = [np.flatnonzero(which == k) for k in range(len(self._sums))]  # that have those layer sizes
        self._after: Ints = memory.sum(axis=0) - memory.cumsum(axis=0)  # [layers, devices]

    def usable(self, left: Ints, i: int) -> Ints:
        """[labels, devices]: the most of `left` that layers after layer i fill."""
        usable: Ints = np.minimum(left, self._after[i])
        for devices, sums in zip(self._devices, self._sums, strict=True):
            if len(sums[i]):
                usable[:, devices] = sums[i][np.searchsorted(sums[i], usable[:, devices], side="right") - 1]
        return usable


def _sums(sizes: Ints, most: int) -> list[Ints]:
    """For each layer the sums of sizes after it, ascending from 0; empty where there are too many."""
    found = [np.zeros(1, dtype=np.int64)]
    for size in sizes[:0:-1]:
        sums = found[-1]
        if len(sums):
            more = np.unique(np.concatenate([sums, sums + size]))
            sums = more[more <= most] if len(more) <= MOST_SUMS else more[:0]
        found.append(sums)
    return found[::-1]
