"""The ring as a chain of visits: the source's first layers, then contiguous ranges on others, then home.

Costs are those of one lap of a micro-batch. A `Chain` belongs to one batch size and one place of the head; `Limits`
says which visits and hops a bottleneck limit leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from peerllm.planner.arrays import Floats, Ints

WORK_PER_LAYER, WORK_PER_VISIT = 3000, 1000  # what a call costs besides its elements, counted in elements


@dataclass(frozen=True, slots=True)
class RouteGraph:
    """Class 0 is the source; the others are numbered from 0 in every array but `hop`. Layers 0..last are placed."""

    first: Floats  # [last + 1]: compute of the source when its range ends at this layer; infinite where it may not
    prefix: Floats  # [classes, last + 2]: compute of layers 0..e-1 on one device of the class
    fits: Ints  # [classes, last + 1]: the last layer that a visit starting at i can hold in memory (i - 1: none)
    hop: Floats  # [last + 1, 1 + classes, classes]: after layer i, from any class (0: the source) on to another
    home: Floats  # [classes]: from layer `last` back to the source
    many: Ints  # [classes]: devices of the class

    @property
    def last(self) -> int:
        return len(self.first) - 1


@dataclass(frozen=True, slots=True)
class CappedRoutes:
    """A chain under a limit on every device's compute and every hop: infinite where it is broken."""

    chain: RouteGraph
    first: Floats
    far: Ints  # [classes, last + 1]: the last layer of the longest visit that starts at i (i - 1: none)
    hop: Floats
    home: Floats

    @property
    def last(self) -> int:
        return self.chain.last


def capped(chain: RouteGraph, bottleneck: float) -> CappedRoutes:
    """What is left when nothing may take longer than `bottleneck`."""
    if np.isinf(bottleneck):
        return CappedRoutes(
            chain, chain.first, np.maximum(chain.fits, np.arange(chain.last + 1) - 1), chain.hop, chain.home
        )
    far = chain.fits.copy()
    for j, prefix in enumerate(chain.prefix):
        computed = np.searchsorted(prefix, prefix[:-1] + bottleneck, side="right") - 2
        far[j] = np.minimum(far[j], computed)
    return CappedRoutes(
        chain,
        np.where(chain.first <= bottleneck, chain.first, np.inf),
        np.maximum(far, np.arange(chain.last + 1) - 1),
        np.where(chain.hop <= bottleneck, chain.hop, np.inf),
        np.where(chain.home <= bottleneck, chain.home, np.inf),
    )


@dataclass(frozen=True, slots=True)
class Visit:
    """Layers up to `last` on a device of class `kind` (-1: the source)."""

    kind: int
    last: int


Route = tuple[Visit, ...]


def route_lap(chain: RouteGraph, way: Route) -> tuple[float, float]:
    """(ring, bottleneck) of a way, limits aside."""
    ring = slowest = float(chain.first[way[0].last])
    for before, visit in pairwise(way):
        hop = float(chain.hop[before.last, before.kind + 1, visit.kind])
        compute = float(chain.prefix[visit.kind, visit.last + 1] - chain.prefix[visit.kind, before.last + 1])
        ring, slowest = ring + hop + compute, max(slowest, hop, compute)
    back = float(chain.home[way[-1].kind])
    return ring + back, max(slowest, back)


def enough_capacity(limits: CappedRoutes) -> bool:
    """Whether the longest visits of all devices together could hold every layer: false refutes the limit."""
    starts = np.arange(limits.last + 1)
    held = np.maximum((limits.far - starts + 1).max(axis=1), 0) @ limits.chain.many
    own = np.flatnonzero(np.isfinite(limits.first))
    return len(own) > 0 and bool(own[-1] + 1 + held >= limits.last + 1)
