"""Good ways among many devices: labels swept layer by layer, the most hopeful kept, guided by the relaxed bound."""

from __future__ import annotations

import numpy as np

from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.routing.route_graph import WORK_PER_LAYER, WORK_PER_VISIT, CappedRoutes, Route, Visit
from peerllm.planner.routing.route_relaxation import RouteBound


class _BeamLabels:
    """Partial ways that end after one layer."""

    def __init__(self, kind: Ints, used: Ints, cost: Floats, parent: Ints) -> None:
        self.kind, self.used, self.cost, self.parent = kind, used, cost, parent  # parent: row in the trail


def beam_search(limits: CappedRoutes, found: RouteBound, goal: float, width: int) -> tuple[Route | None, bool, int]:
    """A way of ring at most `goal`; whether nothing was left out (then none is better, or none there is); the work."""
    chain, last = limits.chain, limits.last
    many, kinds = chain.many, len(chain.many)
    mixer = np.random.default_rng(0).integers(1, 2**62, kinds, dtype=np.int64) | 1
    waiting: dict[int, list[tuple[Ints, Ints, Floats, Ints]]] = {}
    trail: list[tuple[int, int, int]] = []  # (class, last layer, parent) of every label kept
    whole, work = True, 0
    length = np.arange(last + 1)
    capacity = np.maximum((limits.far - length + 1).max(axis=1), 0)
    for i in range(last + 1):
        labels, dropped = _best_labels(waiting.pop(i, []), found, many, mixer, i, width=width)
        whole &= not dropped
        base = len(trail)
        if labels is not None:
            trail += zip(labels.kind.tolist(), [i] * len(labels.kind), labels.parent.tolist(), strict=True)
        if i == last:
            break
        own = np.isfinite(limits.first[i])
        rows = 0 if labels is None else len(labels.kind)
        if own:
            trail.append((-1, i, -1))
        if not own and not rows:
            continue
        kind = np.concatenate([labels.kind if labels else np.empty(0, np.int64), np.full(int(own), -1)])
        before = labels.used if labels else np.empty((0, kinds), np.int64)
        used = np.vstack([before, np.zeros((int(own), kinds), np.int64)])
        cost = np.concatenate([labels.cost if labels else np.empty(0), np.full(int(own), limits.first[i])])
        refund = (many - used) @ found.price
        into = cost[:, None] + limits.hop[i][kind + 1]  # [labels, classes]
        good = (used < many) & (into + found.visit[i + 1] - refund[:, None] <= goal)
        good &= ((many - used) @ capacity >= last - i)[:, None]
        row, target = np.nonzero(good)
        work += WORK_PER_LAYER + good.size
        base_cost = into[row, target] - chain.prefix[target, i + 1]
        allowed = goal + refund[row] - found.price[target]
        far = limits.far[target, i + 1]
        for end in range(i + 1, int(far.max(initial=i)) + 1):
            work += WORK_PER_VISIT + len(row)
            value = base_cost + chain.prefix[target, end + 1]
            keep = np.flatnonzero((far >= end) & (value + found.leave[target + 1, end] <= allowed))
            if len(keep):
                waiting.setdefault(end, []).append((target[keep], used[row[keep]], value[keep], base + row[keep]))
    if labels is None:
        return None, whole, work
    total = labels.cost + limits.home[labels.kind]
    best = int(total.argmin())
    if not total[best] <= goal:
        return None, whole, work
    way, place = [], base + best
    while place >= 0:
        one, end, place = trail[place]
        way.append(Visit(one, end))
    return tuple(reversed(way)), whole, work


def _best_labels(
    parts: list[tuple[Ints, Ints, Floats, Ints]], found: RouteBound, many: Ints, mixer: Ints, i: int, *, width: int
) -> tuple[_BeamLabels | None, bool]:
    """The cheapest of labels alike, and of those the `width` most hopeful; whether any was left out."""
    if not parts:
        return None, False
    kind, used, cost, parent = (np.concatenate(column) for column in zip(*parts, strict=True))
    used[np.arange(len(kind)), kind] += 1
    key = (used * mixer).sum(axis=1) * np.int64(len(many) + 1) + kind
    order = np.lexsort((cost, key))
    fresh = np.concatenate([[True], key[order][1:] != key[order][:-1]])
    keep = order[fresh]
    dropped = len(keep) > width
    if dropped:
        value = cost[keep] + found.leave[kind[keep] + 1, i] - (many - used[keep]) @ found.price
        keep = keep[np.argpartition(value, width)[:width]]
    return _BeamLabels(kind[keep], used[keep], cost[keep], parent[keep]), dropped
