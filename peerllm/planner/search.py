"""Cheapest way through layers × devices under a memory limit per device: exact, or with a proven bound.

Pareto labels (cost, room left on every device) are swept layer by layer. Room beyond what the remaining layers could
take is worthless, so labels of identical layers in another order collapse. A Lagrangian relaxation of the limits gives
the admissible bound that prunes; labels are only ever dropped unproven beyond `MAX_LABELS`, and then it is said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peerllm.planner.relaxation import TOLERANCE, Bound, Floats, Ints, Problem, Sums, fair_price, relax, sums

MAX_LABELS = 8192  # kept per layer; beyond, the best found is returned with its bound
MAX_SWEPT = 300_000  # labels kept over all layers of one sweep: about a second
WIDTHS = (64, 1024, MAX_LABELS)  # one sweep after another: a narrow one finds the limit that prunes the next
DOMINANCE_LABELS = 384  # up to here every pair of labels is compared; beyond, only equal ones collapse


@dataclass(frozen=True, slots=True)
class Found:
    """`homes` is empty when nothing was found; then `reached` is the last layer that found a place."""

    homes: tuple[int, ...]
    cost: float
    bound: float
    reached: int = -1
    proven: bool = True


def cheapest(problem: Problem) -> Found:
    """The cheapest assignment of a device to each layer within `room`."""
    totals = sums(problem)
    unpriced, best, homes = relax(problem, totals, np.zeros(len(problem.room)), np.inf, ())
    found, price = Found(homes, best, best), fair_price(problem)
    for width in (min(width, MAX_SWEPT // len(problem.cost) + 1) for width in WIDTHS):
        priced, best, homes = relax(problem, totals, price, found.cost, found.homes)
        found, price = _sweep(problem, totals, (unpriced, priced), homes, best, width=width), priced.price
        if found.proven:
            break
    return found


def _twins(problem: Problem) -> Ints:
    """For each device the nearest earlier one it could be swapped with unnoticed, or -1: the first comes first."""
    devices = len(problem.room)
    twins = np.full(devices, -1, dtype=np.int64)
    for j in range(2, devices):
        for k in range(j - 1, 0, -1):
            order = np.arange(devices)
            order[[j, k]] = order[[k, j]]
            same = all(
                np.array_equal(a, b)
                for a, b in (
                    (problem.room, problem.room[order]),
                    (problem.back, problem.back[order]),
                    (problem.cost, problem.cost[:, order]),
                    (problem.memory, problem.memory[:, order]),
                    (problem.hop, problem.hop[:, order][:, :, order]),
                )
            )
            if same:
                twins[j] = k
                break
    return twins


def _sweep(
    problem: Problem, totals: Sums, bounds: tuple[Bound, ...], homes: tuple[int, ...], best: float, *, width: int
) -> Found:
    """One pass over the layers with at most `width` labels each, starting from the best way known."""
    layers, devices = problem.cost.shape
    twins = _twins(problem)
    after = np.vstack([problem.memory[::-1].cumsum(axis=0)[::-1][1:], np.zeros((1, devices), dtype=np.int64)])
    least = problem.memory.min(axis=1)
    mixer = np.random.default_rng(0).integers(1, 2**62, devices, dtype=np.int64) | 1
    device = np.zeros(1, dtype=np.int64)
    cost = np.array([problem.cost[0, 0]])
    room = problem.room[None, :].copy()
    room[0, 0] -= problem.memory[0, 0]
    if room[0, 0] < 0 or not np.isfinite(cost[0]):
        return Found((), np.inf, np.inf, -1)
    trail: list[tuple[Ints, Ints]] = [(device, np.zeros(1, dtype=np.int64))]
    dropped = np.inf
    for i in range(1, layers):
        many = len(device)
        parent = np.repeat(np.arange(many), devices)
        target = np.tile(np.arange(devices), many)
        total = (cost[:, None] + problem.hop[i - 1][device] + problem.cost[i]).ravel()
        left = room[parent]
        left[np.arange(len(target)), target] -= problem.memory[i][target]
        fits = np.isfinite(total) & (left[np.arange(len(target)), target] >= 0)
        elder = twins[target]
        fits &= (elder < 0) | (room[parent, elder] < problem.room[elder])
        rest = least[i + 1 :]
        weighing = rest[rest > 0]
        if len(weighing):
            fits &= left.sum(axis=1) >= weighing.sum()
            fits &= (left // weighing.min()).sum(axis=1) >= len(weighing)
        parent, target, total, left = parent[fits], target[fits], total[fits], left[fits]
        useful = np.minimum(left, after[i])
        mine = left[np.arange(len(target)), target]
        value = np.max([total + b.togo(totals, i, target, mine) - useful @ b.price for b in bounds], axis=0)
        hopeful = np.isfinite(value) & (value < best - TOLERANCE * abs(best) if np.isfinite(best) else True)
        parent, target, total, left = parent[hopeful], target[hopeful], total[hopeful], left[hopeful]
        useful, value = useful[hopeful], value[hopeful]
        if not len(target):
            return Found(homes, best, min(best, dropped), i - 1, not np.isfinite(dropped))
        key = (useful * mixer).sum(axis=1) * np.int64(devices + 1) + target
        order = np.lexsort((total, key))
        alike = (target[order][1:] == target[order][:-1]) & (useful[order][1:] == useful[order][:-1]).all(axis=1)
        keep = order[np.concatenate([[True], ~alike])]
        if len(keep) > DOMINANCE_LABELS // 2:
            keep = keep[np.argsort(value[keep], kind="stable")]
        if len(keep) <= DOMINANCE_LABELS:
            keep = keep[_undominated(target[keep], total[keep], useful[keep])]
        if len(keep) > width:
            keep = keep[np.argsort(value[keep], kind="stable")]
            dropped = min(dropped, float(value[keep[width]]))
            keep = keep[:width]
        device, cost, room = target[keep], total[keep], left[keep]
        trail.append((device, parent[keep]))
    end = cost + problem.back[device]
    last = int(end.argmin())
    if end[last] < best:
        best = float(end[last])
        way: list[int] = []
        for device, parent in reversed(trail):
            way.append(int(device[last]))
            last = int(parent[last])
        homes = tuple(reversed(way))
    proven = dropped >= best - TOLERANCE * abs(best)
    return Found(homes, best, best if proven else dropped, layers - 1, proven)


def _undominated(device: Ints, cost: Floats, room: Ints) -> NDArray[np.bool_]:
    """False for a label that another on the same device beats or equals in cost and in room everywhere (first wins)."""
    better = (device[:, None] == device[None, :]) & (cost[:, None] <= cost[None, :])
    better &= (room[:, None, :] >= room[None, :, :]).all(axis=2)
    equal = better & better.T
    better &= ~(equal & (np.arange(len(device))[:, None] >= np.arange(len(device))[None, :]))
    beaten: NDArray[np.bool_] = better.any(axis=0)
    return ~beaten
