"""Label setting block by block: the cheapest route below a cutoff if no label is dropped, else a good one."""

from __future__ import annotations

import numpy as np

from peerllm.planner.arrays import Flags, Floats, Ints
from peerllm.planner.latency.equal_blocks.head_position import HeadPosition, relayed_class_hops
from peerllm.planner.routing.route_graph import WORK_PER_LAYER, WORK_PER_VISIT, Route, Visit
from peerllm.planner.routing.route_relaxation import RouteBound

# Labels: class (0: the source), visits of each class, classes available as relays, cost, row of the parent label.
_Part = tuple[Ints, Ints, Flags, Floats, Ints]


def set_labels(
    position: HeadPosition, relaxed: RouteBound, cutoff: float, width: int, *, strict: bool
) -> tuple[Route | None, bool, int]:
    """(route without its relays, complete, work): a route of at most `cutoff`, relays included, or None.

    If `complete`, no label was dropped: the route is the cheapest, or there is none. Routes with the source alone are
    left out. `strict`: a device that holds a single block is no relay; otherwise only one that could not hold more.
    """
    routes, class_size = position.routes, position.routes.graph.class_size
    last, kinds = routes.last, len(class_size)
    mixer = np.random.default_rng(0).integers(1, 2**62, (2, kinds + 1), dtype=np.int64) | 1
    waiting: dict[int, list[_Part]] = {}
    trail: list[tuple[int, int, int]] = []  # (class, last block, parent row) of every label kept
    complete, work = True, 0
    prefix = routes.graph.prefix
    longest_visit = np.maximum((routes.far - np.arange(last + 1) + 1).max(axis=1), 0)
    for i in range(last):
        parts = waiting.pop(i, [])
        if np.isfinite(routes.first[i]):
            available = np.zeros((1, kinds + 1), dtype=bool)
            available[0, 0] = position.can_relay[0] and (i > 0 or not strict)
            parts.append(
                (np.zeros(1, np.int64), np.zeros((1, kinds), np.int64), available, routes.first[i : i + 1], -_ONE)
            )
        if not parts:
            continue
        (kind, used, available, cost, parent), dropped = _merge(parts, relaxed, class_size, mixer, i, width=width)
        complete &= not dropped
        base = len(trail)
        trail += zip(kind.tolist(), [i] * len(kind), parent.tolist(), strict=True)
        refund = (class_size - used) @ relaxed.price
        can_continue = (used < class_size) & (((class_size - used) @ longest_visit) >= last - i)[:, None]
        floor = cost[:, None] + routes.hop[i][kind] + relaxed.visit[i + 1] - refund[:, None]
        some = np.flatnonzero((can_continue & (floor <= cutoff)).any(axis=1))
        work += WORK_PER_LAYER + len(kind) * kinds
        if not len(some):
            continue
        hops, touched = relayed_class_hops(position, kind[some], available[some])
        into = cost[some, None] + hops[:, 1:]
        work += touched // 3
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, and nothing is <= NaN
            allowed_here = cutoff + refund[some, None] - relaxed.visit[i + 1]
        row, target = np.nonzero(can_continue[some] & (into <= allowed_here))
        begun = into[row, target] - prefix[target, i + 1]
        row = some[row]
        allowed = cutoff + refund[row] - relaxed.price[target]
        far = routes.far[target, i + 1]
        for end in range(i + 1, int(far.max(initial=i)) + 1):
            work += WORK_PER_VISIT + len(row)
            value = begun + prefix[target, end + 1]
            keep = np.flatnonzero((far >= end) & (value + relaxed.leave[target + 1, end] <= allowed))
            if len(keep):
                work += 3 * len(keep) * kinds
                rows, kinds_there, each = row[keep], target[keep], np.arange(len(keep))
                now_used, now_ready = used[rows], available[rows]
                now_used[each, kinds_there] += 1
                now_ready[each, kinds_there + 1] |= position.can_relay[kinds_there + 1] & (end > i + 1 or not strict)
                waiting.setdefault(end, []).append((kinds_there + 1, now_used, now_ready, value[keep], base + rows))
    parts = waiting.pop(last, [])
    if not parts:
        return None, complete, work
    (kind, _, available, cost, parent), _ = _merge(parts, relaxed, class_size, mixer, last, width=2**62)
    total = cost + _homeward(position, kind, available)
    best = int(total.argmin())
    if not total[best] <= cutoff:
        return None, complete, work
    route, before = [Visit(int(kind[best]) - 1, last)], int(parent[best])
    while before >= 0:
        one, end, before = trail[before]
        route.append(Visit(one - 1, end))
    return tuple(reversed(route)), complete, work


_ONE = np.ones(1, dtype=np.int64)


def _homeward(position: HeadPosition, kind: Ints, available: Flags) -> Floats:
    """[labels]: from the last block through the head home, over relays where that is shorter."""
    relayed = np.where(available, relayed_class_hops(position, kind, available)[0] + position.home, np.inf).min(axis=1)
    best: Floats = np.minimum(position.home[kind], relayed)
    return best


def _merge(
    parts: list[_Part], relaxed: RouteBound, class_size: Ints, mixer: Ints, i: int, *, width: int
) -> tuple[_Part, bool]:
    """Labels that no equivalent one beats in cost and relays, at most the `width` best; whether any was dropped."""
    kind, used, available, cost, parent = (np.concatenate(column) for column in zip(*parts, strict=True))
    key = (used * mixer[0, 1:]).sum(axis=1) * np.int64(len(class_size) + 1) + kind
    order = np.lexsort((cost, key))
    group = np.concatenate([[True], key[order][1:] != key[order][:-1]])
    cheapest = order[np.flatnonzero(group)][group.cumsum() - 1]  # for each label, the cheapest of the equivalent ones
    more = (available[order] & ~available[cheapest]).any(axis=1)
    keep = order[group | more]
    if more.any():
        full = key[keep] + (available[keep] * mixer[1]).sum(axis=1)
        again = np.lexsort((cost[keep], full))
        keep = keep[again[np.concatenate([[True], full[again][1:] != full[again][:-1]])]]
    dropped = len(keep) > width
    if dropped:
        value = cost[keep] + relaxed.leave[kind[keep], i] - (class_size - used[keep]) @ relaxed.price
        keep = keep[np.argpartition(value, width)[:width]]
    return (kind[keep], used[keep], available[keep], cost[keep], parent[keep]), dropped
