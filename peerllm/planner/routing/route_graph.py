"""The graph of routes: the source's first layers, then contiguous ranges of layers on other devices, then home.

All costs are those of one lap of one micro-batch. A `RouteGraph` belongs to one batch size and one place of the head;
`CappedRoutes` keeps the visits and hops within a bottleneck limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from peerllm.planner.arrays import Floats, Ints

WORK_PER_LAYER, WORK_PER_VISIT = 3000, 1000  # overhead of a numpy call, in array elements


@dataclass(frozen=True, slots=True)
class RouteGraph:
    """Costs by class of devices, the source left out except as a sender in `hop`. Layers 0..last are placed."""

    first: Floats  # [last + 1]: compute of the source if its range ends at this layer; infinite where it may not
    prefix: Floats  # [classes, last + 2]: compute of layers 0..e-1 on one device of the class
    fits: Ints  # [classes, last + 1]: the last layer that a visit starting at i can hold in memory (i - 1: none)
    hop: Floats  # [last + 1, 1 + classes, classes]: after layer i, from class (0: the source) to class
    home: Floats  # [classes]: from layer `last` back to the source
    class_size: Ints  # [classes]: devices of the class

    @property
    def last(self) -> int:
        return len(self.first) - 1


@dataclass(frozen=True, slots=True)
class CappedRoutes:
    """A route graph in which visits and hops that exceed a bottleneck limit are infinite or left out."""

    graph: RouteGraph
    first: Floats
    far: Ints  # [classes, last + 1]: the last layer of the longest visit that starts at i (i - 1: none)
    hop: Floats
    home: Floats

    @property
    def last(self) -> int:
        return self.graph.last


def capped(graph: RouteGraph, bottleneck: float) -> CappedRoutes:
    """The routes on which no visit and no hop takes longer than `bottleneck`."""
    if np.isinf(bottleneck):
        return CappedRoutes(
            graph, graph.first, np.maximum(graph.fits, np.arange(graph.last + 1) - 1), graph.hop, graph.home
        )
    far = graph.fits.copy()
    for j, prefix in enumerate(graph.prefix):
        computed = np.searchsorted(prefix, prefix[:-1] + bottleneck, side="right") - 2
        far[j] = np.minimum(far[j], computed)
    return CappedRoutes(
        graph,
        np.where(graph.first <= bottleneck, graph.first, np.inf),
        np.maximum(far, np.arange(graph.last + 1) - 1),
        np.where(graph.hop <= bottleneck, graph.hop, np.inf),
        np.where(graph.home <= bottleneck, graph.home, np.inf),
    )


@dataclass(frozen=True, slots=True)
class Visit:
    """The layers up to `last` on a device of class `kind` (-1: the source)."""

    kind: int
    last: int


Route = tuple[Visit, ...]


def route_lap(graph: RouteGraph, route: Route) -> tuple[float, float]:
    """(ring, bottleneck) of a route; limits are not checked."""
    ring = slowest = float(graph.first[route[0].last])
    for before, visit in pairwise(route):
        hop = float(graph.hop[before.last, before.kind + 1, visit.kind])
        compute = float(graph.prefix[visit.kind, visit.last + 1] - graph.prefix[visit.kind, before.last + 1])
        ring, slowest = ring + hop + compute, max(slowest, hop, compute)
    back = float(graph.home[route[-1].kind])
    return ring + back, max(slowest, back)


def enough_capacity(routes: CappedRoutes) -> bool:
    """Whether the longest visits of all devices together hold every layer; if not, no route keeps the limit."""
    starts = np.arange(routes.last + 1)
    held = np.maximum((routes.far - starts + 1).max(axis=1), 0) @ routes.graph.class_size
    own = np.flatnonzero(np.isfinite(routes.first))
    return len(own) > 0 and bool(own[-1] + 1 + held >= routes.last + 1)
