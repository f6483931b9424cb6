"""Local search for rings whose blocks cost the same on a device, whatever their place."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from peerllm.planner.cost.layer_costs import SOURCE_LAYERS
from peerllm.planner.routing.order_search import BlockRing, DeviceOrder, OrderSearch, iterated_local_search
from peerllm.planner.routing.route_graph import CappedRoutes, Route, Visit

ALIKE = 1e-9  # relative
BUDGET = 4_000_000  # array elements touched


def ring_of_blocks(routes: CappedRoutes) -> BlockRing | None:
    """The ring as equal blocks, a head at the end counted as one; None unless all blocks cost and send alike."""
    graph, last = routes.graph, routes.last
    steps = np.diff(graph.prefix[:, SOURCE_LAYERS : last + 2], axis=1)
    if steps.shape[1] < 2 or not len(graph.class_size) or not np.isfinite(routes.first[SOURCE_LAYERS - 1]):
        return None
    if (abs(steps[:, :-1] - steps[:, :1]) > ALIKE * abs(steps[:, :1])).any():
        return None
    if (graph.hop[SOURCE_LAYERS:last] != graph.hop[SOURCE_LAYERS - 1]).any():
        return None
    own = np.flatnonzero(np.isfinite(routes.first))
    own_step = routes.first[own[-1]] - routes.first[own[-1] - 1] if len(own) > 1 else 0.0
    count = last + 1 - SOURCE_LAYERS
    hop = np.full((len(graph.class_size) + 1,) * 2, np.inf)
    hop[:, 1:] = routes.hop[SOURCE_LAYERS - 1]
    return BlockRing(
        count,
        float(routes.first[SOURCE_LAYERS - 1]),
        np.append(own_step, steps[:, 0]),
        np.append(own[-1] + 1 - SOURCE_LAYERS, np.maximum(routes.far[:, SOURCE_LAYERS] + 1 - SOURCE_LAYERS, 0)),
        np.append(0, graph.class_size),
        hop,
        np.append(np.inf, routes.home + steps[:, -1] - steps[:, 0]),
    )


def local_search_ring(routes: CappedRoutes, promising: Route) -> tuple[Route | None, int]:
    """(route, work): a good ring within the limits, or None. The search starts from the devices of `promising`."""
    ring = ring_of_blocks(routes)
    if ring is None:
        return None, 0
    search = OrderSearch(ring)
    good = iterated_local_search([search], [visit.kind + 1 for visit in promising[1:]], BUDGET)
    route = None if good is None else _route(routes, search, good[1])
    return route, search.work


def _route(routes: CappedRoutes, search: OrderSearch, order: DeviceOrder) -> Route | None:
    """The order as a route; None if it breaks a limit after all, since the head may be larger than a block."""
    ends = search.blocks_per_visit(order).cumsum() + SOURCE_LAYERS - 1
    route = tuple(Visit(int(kind), int(end)) for kind, end in zip(np.append(0, order) - 1, ends, strict=True))
    held = all(visit.last <= routes.far[visit.kind, before.last + 1] for before, visit in pairwise(route))
    return route if held and np.isfinite(routes.first[route[0].last]) else None
