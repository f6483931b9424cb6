"""Beam search for good routes among many devices: of each layer the most promising labels by the bound are kept."""

from __future__ import annotations

import numpy as np

from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.routing.route_graph import WORK_PER_LAYER, WORK_PER_VISIT, CappedRoutes, Route, Visit
from peerllm.planner.routing.route_relaxation import RouteBound


class _BeamLabels:
    """Partial routes that end after one layer."""

    def __init__(self, kind: Ints, used: Ints, cost: Floats, parent: Ints) -> None:
        self.kind, self.used, self.cost, self.parent = kind, used, cost, parent  # parent: row in the trail


def beam_search(routes: CappedRoutes, relaxed: RouteBound, cutoff: float, width: int) -> tuple[Route | None, bool, int]:
    """(route, complete, work): a route of ring at most `cutoff`, or None.

    If `complete`, no label was dropped: the route is the shortest, or there is none.
    """
    graph, last = routes.graph, routes.last
    class_size, kinds = graph.class_size, len(graph.class_size)
    mixer = np.random.default_rng(0).integers(1, 2**62, kinds, dtype=np.int64) | 1
    waiting: dict[int, list[tuple[Ints, Ints, Floats, Ints]]] = {}
    trail: list[tuple[int, int, int]] = []  # (class, last layer, parent) of every label kept
    complete, work = True, 0
    length = np.arange(last + 1)
    longest_visit = np.maximum((routes.far - length + 1).max(axis=1), 0)
    for i in range(last + 1):
        labels, dropped = _best_labels(waiting.pop(i, []), relaxed, class_size, mixer, i, width=width)
        complete &= not dropped
        base = len(trail)
        if labels is not None:
            trail += zip(labels.kind.tolist(), [i] * len(labels.kind), labels.parent.tolist(), strict=True)
        if i == last:
            break
        own = np.isfinite(routes.first[i])
        rows = 0 if labels is None else len(labels.kind)
        if own:
            trail.append((-1, i, -1))
        if not own and not rows:
            continue
        kind = np.concatenate([labels.kind if labels else np.empty(0, np.int64), np.full(int(own), -1)])
        before = labels.used if labels else np.empty((0, kinds), np.int64)
        used = np.vstack([before, np.zeros((int(own), kinds), np.int64)])
        cost = np.concatenate([labels.cost if labels else np.empty(0), np.full(int(own), routes.first[i])])
        refund = (class_size - used) @ relaxed.price
        into = cost[:, None] + routes.hop[i][kind + 1]  # [labels, classes]
        good = (used < class_size) & (into + relaxed.visit[i + 1] - refund[:, None] <= cutoff)
        good &= ((class_size - used) @ longest_visit >= last - i)[:, None]
        row, target = np.nonzero(good)
        work += WORK_PER_LAYER + good.size
        base_cost = into[row, target] - graph.prefix[target, i + 1]
        allowed = cutoff + refund[row] - relaxed.price[target]
        far = routes.far[target, i + 1]
        for end in range(i + 1, int(far.max(initial=i)) + 1):
            work += WORK_PER_VISIT + len(row)
            value = base_cost + graph.prefix[target, end + 1]
            keep = np.flatnonzero((far >= end) & (value + relaxed.leave[target + 1, end] <= allowed))
            if len(keep):
                waiting.setdefault(end, []).append((target[keep], used[row[keep]], value[keep], base + row[keep]))
    if labels is None:
        return None, complete, work
    total = labels.cost + routes.home[labels.kind]
    best = int(total.argmin())
    if not total[best] <= cutoff:
        return None, complete, work
    route, place = [], base + best
    while place >= 0:
        one, end, place = trail[place]
        route.append(Visit(one, end))
    return tuple(reversed(route)), complete, work


def _best_labels(
    parts: list[tuple[Ints, Ints, Floats, Ints]],
    relaxed: RouteBound,
    class_size: Ints,
    mixer: Ints,
    i: int,
    *,
    width: int,
) -> tuple[_BeamLabels | None, bool]:
    """The cheapest of equivalent labels, of these the `width` most promising; whether any was dropped."""
    if not parts:
        return None, False
    kind, used, cost, parent = (np.concatenate(column) for column in zip(*parts, strict=True))
    used[np.arange(len(kind)), kind] += 1
    key = (used * mixer).sum(axis=1) * np.int64(len(class_size) + 1) + kind
    order = np.lexsort((cost, key))
    fresh = np.concatenate([[True], key[order][1:] != key[order][:-1]])
    keep = order[fresh]
    dropped = len(keep) > width
    if dropped:
        value = cost[keep] + relaxed.leave[kind[keep] + 1, i] - (class_size - used[keep]) @ relaxed.price
        keep = keep[np.argpartition(value, width)[:width]]
    return _BeamLabels(kind[keep], used[keep], cost[keep], parent[keep]), dropped
