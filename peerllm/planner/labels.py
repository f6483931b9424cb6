"""Partial ways swept layer by layer under a goal: exact if nothing is left out, else a good way among the hopeful."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peerllm.planner.relaxation import Floats, Ints, Relaxed, Visits

WORK_PER_LAYER, WORK_PER_VISIT = 3000, 1000  # what a call costs besides its elements, counted in elements
DOMINANCE_LABELS = 256  # up to here every pair of labels is compared; beyond, only equal ones collapse

Way = list[tuple[int, int]]  # (device, last layer) of each visit
_Part = tuple[Ints, Ints, Floats, Ints]  # device, room left [labels, devices], cost, row of the label before


def search(held: Visits, found: Relaxed, goal: float, width: int, twins: Ints) -> tuple[Way | None, bool, int, int]:
    """A way of cost at most `goal`; whether nothing was left out; the work; the last layer that found a place.

    With nothing left out the way is the cheapest, or there is none within the goal. `twins`: see `twins_of`.
    """
    problem, (devices, layers) = held.problem, held.far.shape
    need = problem.memory.min(axis=1)
    least, weighing = (np.append(x[::-1].cumsum()[::-1], 0) for x in (need, (need > 0).astype(np.int64)))
    smallest = int(need[need > 0].min(initial=2**62))
    mixer: Ints = np.random.default_rng(0).integers(1, 2**62, (devices,), dtype=np.int64) | 1
    trail: list[tuple[int, int, int]] = []  # (device, last layer, row before) of every label kept
    waiting: dict[int, list[_Part]] = {}
    whole, work, reached = True, 0, -1

    def refund(left: Ints, layer: int) -> Floats:
        """The worth of what labels leave unused, at most."""
        return found.refund(np.minimum(left, held.after[layer]), problem.room)

    def grow(start: int, base: int, part: tuple[Ints, Ints, Floats]) -> None:
        """Visits from layer `start` on: `part` are (device, room left, cost before), rows counted from `base`."""
        nonlocal work
        target, row, cost = part
        left = rooms[row]
        spare = left[np.arange(len(row)), target]
        cost = cost - held.cost[target, start]
        far = held.far[target, start]
        for end in range(start, int(far.max(initial=start - 1)) + 1):
            work += WORK_PER_VISIT + len(row) * devices
            taken = held.memory[target, end + 1] - held.memory[target, start]
            value = cost + held.cost[target, end + 1]
            keep = np.flatnonzero((far >= end) & (taken <= spare) & (value + found.leave[target, end] - slack <= goal))
            if not len(keep):
                continue
            after = left[keep]
            after[np.arange(len(keep)), target[keep]] -= taken[keep]
            bound = value[keep] + found.leave[target[keep], end] - refund(after, end)
            good = (bound <= goal) & (after.sum(axis=1) >= least[end + 1])
            good &= (after // smallest).sum(axis=1) >= weighing[end + 1]
            if good.any():
                waiting.setdefault(end, []).append(
                    (target[keep[good]], after[good], value[keep[good]], base + row[keep[good]])
                )

    rooms = problem.room[None, :].copy()
    slack = float(found.refund(held.room, problem.room))  # no refund is more
    if problem.room[0] >= 0:
        trail.append((-1, -1, -1))
        grow(0, 0, (np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1)))
    for i in range(layers):
        labels, dropped = _merge(waiting.pop(i, []), held, found, mixer, i, width=width)
        whole &= not dropped
        if labels is None:
            continue
        device, rooms, cost, parent = labels
        reached, base = i, len(trail)
        trail += zip(device.tolist(), [i] * len(device), parent.tolist(), strict=True)
        if i == layers - 1:
            total = cost + problem.back[device]
            best = int(total.argmin())
            if total[best] <= goal:
                return _back(trail, base + best), whole, work, reached
            break
        work += WORK_PER_LAYER + len(device) * devices * 4
        into = cost[:, None] + held.hop[i, device]
        value = into + found.visit[i + 1] - refund(rooms, i)[:, None]
        good = (value <= goal) & (rooms >= problem.memory[i + 1])
        elder = np.where(twins >= 0, twins, 0)
        good &= (twins < 0) | (rooms[:, elder] < problem.room[elder]) | (problem.memory[i + 1] == 0)
        row, target = np.nonzero(good)
        slack = float(refund(rooms, i).max(initial=0.0))
        grow(i + 1, base, (target, row, into[row, target]))
    return None, whole, work, reached


def _merge(
    parts: list[_Part], held: Visits, found: Relaxed, mixer: Ints, i: int, *, width: int
) -> tuple[_Part | None, bool]:
    """The cheapest of labels alike, and of those the `width` most hopeful; whether any was left out."""
    if not parts:
        return None, False
    device, left, cost, parent = (np.concatenate(column) for column in zip(*parts, strict=True))
    useful = np.minimum(left, held.after[i])
    key = (useful * mixer).sum(axis=1) * np.int64(left.shape[1] + 1) + device
    order = np.lexsort((cost, key))
    sorted_ = key[order]
    keep = order[np.concatenate([[True], sorted_[1:] != sorted_[:-1]])]
    if len(keep) <= DOMINANCE_LABELS:
        keep = keep[_undominated(device[keep], cost[keep], useful[keep])]
    dropped = len(keep) > width
    if dropped:
        value = cost[keep] + found.leave[device[keep], i] - found.refund(useful[keep], held.problem.room)
        keep = keep[np.argpartition(value, width)[:width]]
    return (device[keep], left[keep], cost[keep], parent[keep]), dropped


def _undominated(device: Ints, cost: Floats, room: Ints) -> NDArray[np.bool_]:
    """False for a label that another on the same device beats or equals in cost and in room everywhere (first wins)."""
    better = (device[:, None] == device[None, :]) & (cost[:, None] <= cost[None, :])
    better &= (room[:, None, :] >= room[None, :, :]).all(axis=2)
    equal = better & better.T
    better &= ~(equal & (np.arange(len(device))[:, None] >= np.arange(len(device))[None, :]))
    beaten: NDArray[np.bool_] = better.any(axis=0)
    return ~beaten


def _back(trail: list[tuple[int, int, int]], row: int) -> Way:
    way: Way = []
    while row > 0:
        device, end, row = trail[row]
        way.append((device, end))
    return way[::-1]
