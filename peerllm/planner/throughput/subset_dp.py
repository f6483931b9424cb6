"""The shortest ring under a bottleneck limit, exactly: dynamic programming over layers and subsets of used devices.

EdgeShard's eq. 9-13 with classes: a state is the last layer placed, the class that holds it, and how many devices of
each class are used (a mixed-radix number). A Lagrangian bound prunes states that cannot end at or below the cutoff.
"""

from __future__ import annotations

from math import prod

import numpy as np

from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.routing.route_graph import CappedRoutes, Route, Visit
from peerllm.planner.routing.route_relaxation import RouteBound

SLACK = 1e-9  # relative; sums taken in another order differ by less


def subset_count(class_size: Ints) -> int:
    """How many states of used devices there are."""
    return prod(int(n) + 1 for n in class_size)


def least_ring(routes: CappedRoutes, relaxed: RouteBound, cutoff: float) -> Route | None:
    """The route of the shortest ring, if that is at most `cutoff`."""
    graph, last = routes.graph, routes.last
    kinds, class_size = len(graph.class_size), graph.class_size
    stride = np.concatenate([[1], np.cumprod(class_size[:-1] + 1)]).astype(np.int64)
    codes = np.arange(subset_count(class_size), dtype=np.int64)
    used = (codes[None, :] // stride[:, None]) % (class_size[:, None] + 1)
    refund = relaxed.price @ (class_size[:, None] - used)  # the prices of the devices that a state has not used
    spare = cutoff * (1 + SLACK) + refund
    placed: dict[int, Floats] = {}

    def enter(i: int, kind: int, columns: Ints, cost: Floats) -> None:
        """Enter a device of `kind` at layer i from states `columns` at `cost`."""
        good = (used[kind, columns] < class_size[kind]) & (cost + relaxed.visit[i, kind] <= spare[columns])
        if not good.any():
            return
        columns, cost = columns[good] + stride[kind], cost[good]
        allowed = spare[columns]
        prefix = graph.prefix[kind]
        for end in range(i, int(routes.far[kind, i]) + 1):
            value = cost + (prefix[end + 1] - prefix[i])
            keep = value + relaxed.leave[kind + 1, end] <= allowed
            if keep.any():
                if end not in placed:
                    placed[end] = np.full((kinds, len(codes)), np.inf)
                row, into = placed[end][kind], columns[keep]
                row[into] = np.minimum(row[into], value[keep])

    none = np.zeros(1, dtype=np.int64)
    for i in range(last):
        start = routes.first[i]
        at = placed.get(i)
        columns = np.flatnonzero(np.isfinite(at).any(axis=0)) if at is not None else none[:0]
        for kind in range(kinds):
            if np.isfinite(start) and np.isfinite(routes.hop[i, 0, kind]):
                enter(i + 1, kind, none, np.array([start + routes.hop[i, 0, kind]]))
            if at is not None and len(columns):
                enter(i + 1, kind, columns, (at[:, columns] + routes.hop[i, 1:, kind, None]).min(axis=0))
    if last not in placed:
        return None
    total = placed[last] + routes.home[:, None]
    kind, code = divmod(int(total.argmin()), len(codes))
    if not total[kind, code] <= cutoff:
        return None
    return _backtrack(routes, placed, stride, kind, code)


def _backtrack(routes: CappedRoutes, placed: dict[int, Floats], stride: Ints, kind: int, code: int) -> Route:
    """The route whose costs add up to the cost of the state."""
    graph, end, route = routes.graph, routes.last, []
    while True:
        value, before = float(placed[end][kind, code]), code - int(stride[kind])
        route.append(Visit(kind, end))
        best, step = np.inf, (-1, -1)
        for start in range(1, end + 1):
            if routes.far[kind, start] < end:
                continue
            compute = graph.prefix[kind, end + 1] - graph.prefix[kind, start]
            options = routes.hop[start - 1, :, kind].copy()
            options[0] += routes.first[start - 1] if before == 0 else np.inf
            options[1:] += placed[start - 1][:, before] if start - 1 in placed else np.inf
            prior = int(options.argmin())
            if abs(options[prior] + compute - value) < best:
                best, step = abs(options[prior] + compute - value), (prior - 1, start - 1)
        kind, end, code = step[0], step[1], before
        if kind < 0:
            return (Visit(-1, end), *reversed(route))
