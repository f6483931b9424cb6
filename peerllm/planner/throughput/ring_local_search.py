"""Rings as rounds of like blocks, where the layers are alike: for the local search."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from peerllm.planner.cost.layer_costs import SOURCE_LAYERS
from peerllm.planner.routing.order_search import BlockRing, DeviceOrder, OrderSearch, iterated_local_search
from peerllm.planner.routing.route_graph import CappedRoutes, Route, Visit

ALIKE = 1e-9  # relative
BUDGET = 4_000_000  # array elements that one search touches


def ring_of_blocks(limits: CappedRoutes) -> BlockRing | None:
    """None unless all blocks behind the source's own cost alike; a head at the end counts as a block there."""
    chain, last = limits.chain, limits.last
    steps = np.diff(chain.prefix[:, SOURCE_LAYERS : last + 2], axis=1)
    if steps.shape[1] < 2 or not len(chain.many) or not np.isfinite(limits.first[SOURCE_LAYERS - 1]):
        return None
    if (abs(steps[:, :-1] - steps[:, :1]) > ALIKE * abs(steps[:, :1])).any():
        return None
    if (chain.hop[SOURCE_LAYERS:last] != chain.hop[SOURCE_LAYERS - 1]).any():
        return None
    own = np.flatnonzero(np.isfinite(limits.first))
    own_step = limits.first[own[-1]] - limits.first[own[-1] - 1] if len(own) > 1 else 0.0
    count = last + 1 - SOURCE_LAYERS
    hop = np.full((len(chain.many) + 1,) * 2, np.inf)
    hop[:, 1:] = limits.hop[SOURCE_LAYERS - 1]
    return BlockRing(
        count,
        float(limits.first[SOURCE_LAYERS - 1]),
        np.append(own_step, steps[:, 0]),
        np.append(own[-1] + 1 - SOURCE_LAYERS, np.maximum(limits.far[:, SOURCE_LAYERS] + 1 - SOURCE_LAYERS, 0)),
        np.append(0, chain.many),
        hop,
        np.append(np.inf, limits.home + steps[:, -1] - steps[:, 0]),
    )


def local_search_ring(limits: CappedRoutes, hopeful: Route) -> tuple[Route | None, int]:
    """A good ring within the limits, through devices that `hopeful` (any way) visits first of all; and the work."""
    around = ring_of_blocks(limits)
    if around is None:
        return None, 0
    search = OrderSearch(around)
    good = iterated_local_search([search], [visit.kind + 1 for visit in hopeful[1:]], BUDGET)
    way = None if good is None else _way(limits, search, good[1])
    return way, search.work


def _way(limits: CappedRoutes, search: OrderSearch, order: DeviceOrder) -> Route | None:
    """None if a limit is broken after all: the head may be larger than a block."""
    ends = search.dealt(order).cumsum() + SOURCE_LAYERS - 1
    way = tuple(Visit(int(kind), int(end)) for kind, end in zip(np.append(0, order) - 1, ends, strict=True))
    held = all(visit.last <= limits.far[visit.kind, before.last + 1] for before, visit in pairwise(way))
    return way if held and np.isfinite(limits.first[way[0].last]) else None
