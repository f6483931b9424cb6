"""The best ring over every micro-batch size: intervals of sizes are refuted, split, searched, until none is left.

All figures are milliseconds per token: `worth` of a ring is max(bottleneck, ring / micro-batches) / batch, the inverse
of EdgeShard's no-bubble rate. An interval is judged by costs no size in it can beat.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from peerllm.planner.arrays import Floats
from peerllm.planner.routing.route_graph import CappedRoutes, Route, RouteGraph, capped, enough_capacity, route_lap
from peerllm.planner.routing.route_relaxation import STEPS, initial_price, raise_bound, relaxed_route, route_bound
from peerllm.planner.throughput.beam_search import beam_search
from peerllm.planner.throughput.class_tables import ClassTables
from peerllm.planner.throughput.ring_local_search import local_search_ring
from peerllm.planner.throughput.subset_dp import least_ring, subset_count

EXACT = 1e-10  # relative; two plans closer than this are one
SMALL = 2_000_000  # layers × classes² × sets of devices up to which the exact search is quicker than any bound
LARGEST_STATES = 1 << 16  # sets of used devices up to which the exact search is tried at all
WIDTHS = (48, 400)  # labels kept per layer by the search for a good way
BUDGET = 150_000_000  # array elements touched before an open interval is left open, with its bound
STRIDE = 0.3  # of the way from the bound to the best that is tried next
CLOSE = 1e-4  # relative; so close to the best, all that is better is tried at once
NARROW = 0.004  # an interval whose bound is this close to what could not be refuted is left open
BISECTIONS = 12


@dataclass(order=True, slots=True)
class _Interval:
    """Batches low..high with the head at its place; `bound` is proven, nothing was found below `tried`."""

    bound: float
    turn: int
    low: int = field(compare=False)
    high: int = field(compare=False)
    head_home: bool = field(compare=False)
    price: Floats | None = field(compare=False, default=None)
    tried: float = field(compare=False, default=np.inf)
    rounds: int = field(compare=False, default=0)
    way: Route = field(compare=False, default=())  # the last one found


class BatchSizeSearch:
    """`best` and `way` are the best ring met; `bound` what no ring can beat, once `run` has returned."""

    def __init__(self, tables: ClassTables, sequences: int, offer: Callable[[Route, bool], float], best: float) -> None:
        self.best = self.bound = best
        self._tables, self._sequences, self._offer = tables, sequences, offer
        self._chains: dict[tuple[int, int, bool], RouteGraph | None] = {}
        self._heap: list[_Interval] = []
        self._turns = self._work = 0

    def run(self, places: tuple[bool, ...]) -> None:
        """`places`: whether the head may be back on the source, and whether it may not."""
        for head_home in places:
            self._push(_Interval(0.0, 0, 1, self._sequences, head_home))
        left = np.inf
        while self._heap:
            span = heapq.heappop(self._heap)
            if span.bound >= self.best * (1 - EXACT):
                break
            chain = self._chain(span)
            if chain is None or not len(chain.many):
                continue
            if span.rounds == 0:
                span.bound = max(span.bound, self._floor(span, chain))
                span.rounds = 1
                self._push(span)
            elif span.low < span.high:
                self._split(span, chain)
            elif self._work > BUDGET * self._scale() or span.tried - span.bound <= NARROW * span.tried < np.inf:
                left = min(left, span.bound)
            else:
                self._try(span, chain)
        self.bound = min(left, self.best)

    def _scale(self) -> float:
        """A small problem may take its whole time; its searches end by themselves."""
        return 1.0 if subset_count(self._tables.many) > LARGEST_STATES else np.inf

    def _push(self, span: _Interval) -> None:
        self._turns += 1
        span.turn = self._turns
        heapq.heappush(self._heap, span)

    def _chain(self, span: _Interval) -> RouteGraph | None:
        key = (span.low, span.high, span.head_home)
        if key not in self._chains:
            self._chains[key] = self._tables.chain(*key)
        return self._chains[key]

    def _goals(self, span: _Interval, worth: float) -> tuple[float, float]:
        """(bottleneck, ring) that a ring of this worth may reach at most."""
        return worth * span.high, worth * span.high * (self._sequences // span.low)

    def _floor(self, span: _Interval, chain: RouteGraph) -> float:
        """A first bound: the fastest way if devices could be visited again, and room enough for all layers."""
        self._work += chain.hop.size
        free = route_bound(capped(chain, np.inf), np.zeros(len(chain.many))).value
        if not np.isfinite(free):
            return np.inf
        low = free / (span.high * (self._sequences // span.low))
        high = free / span.high
        if not enough_capacity(capped(chain, np.inf)):
            return np.inf
        while not enough_capacity(capped(chain, high * span.high)):
            low, high = high, 2 * high + 1e-9
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if enough_capacity(capped(chain, middle * span.high)):
                high = middle
            else:
                low = middle
        return low

    def _split(self, span: _Interval, chain: RouteGraph) -> None:
        slowest, _ = self._goals(span, self.best * (1 - EXACT))
        if np.isfinite(self.best) and not enough_capacity(capped(chain, slowest)):
            return
        middle = (span.low + span.high) // 2
        for low, high in ((span.low, middle), (middle + 1, span.high)):
            self._push(_Interval(span.bound, 0, low, high, span.head_home, span.price))

    def _ceiling(self, chain: RouteGraph) -> float:
        """More than any ring costs."""
        slow = np.where(np.isfinite(chain.hop), chain.hop, 0.0).max(axis=(1, 2)).sum()
        home = np.where(np.isfinite(chain.home), chain.home, 0.0).max(initial=0.0)
        first = np.where(np.isfinite(chain.first), chain.first, 0.0).max()
        return float(first + slow + home + chain.prefix[:, -1].max(initial=0.0) * (chain.last + 1) + 1.0)

    def _try(self, span: _Interval, chain: RouteGraph) -> None:
        """Look for a ring at least as good as some worth, or prove that there is none."""
        top = min(self.best * (1 - EXACT), span.tried)
        first = span.rounds == 1
        if np.isinf(top):
            worth = self._ceiling(chain) / span.high
        elif first or top - span.bound <= CLOSE * top:
            worth = top
        else:
            # Proofs close above the bound are cheap, and a way found there leaves little to prove.
            worth = span.bound + STRIDE * (top - span.bound)
        span.rounds += 1
        slowest, ring = self._goals(span, worth)
        floor, way = self._judge(span, capped(chain, slowest), ring, bounds_only=first and np.isfinite(top))
        # A ring either breaks the limit, and is worth more than what was tried, or is no shorter than the floor.
        span.bound = max(span.bound, min(worth, floor / ring * worth))
        if way is not None:
            self._offered(way, span, chain)
        elif floor < ring:
            span.tried = span.tried if first else worth
        elif np.isinf(self.best):
            return  # there is no way at all
        self._push(span)

    def _offered(self, way: Route, span: _Interval, chain: RouteGraph) -> None:
        ring, slowest = route_lap(chain, way)
        worth = max(slowest, ring / (self._sequences // span.low)) / span.low
        self.best = min(self.best, worth, self._offer(way, span.head_home))

    def _judge(
        self, span: _Interval, limits: CappedRoutes, ring: float, bounds_only: bool
    ) -> tuple[float, Route | None]:
        """(what no ring under the limits can be shorter than, a way of at most `ring` if one was found)."""
        many = limits.chain.many
        if not enough_capacity(limits):
            return np.inf, None
        price = span.price if span.price is not None else initial_price(limits)
        count = subset_count(many)
        quick = limits.chain.hop.size * count <= SMALL
        found, way, steps = raise_bound(limits, price, ring, 8 if quick else STEPS)
        self._work += steps * (limits.chain.hop.size + limits.chain.first.size * 40)
        span.price = found.price
        if not found.value <= ring:
            return np.inf, None
        if not quick:
            if way is not None:
                return found.value, way
            if bounds_only:
                return found.value, None
            for width in WIDTHS:
                way, whole, work = beam_search(limits, found, ring, width)
                self._work += work
                if whole:
                    return (np.inf if way is None else route_lap(limits.chain, way)[0]), way
                if way is not None:
                    span.way = way
                    return found.value, way
            way, work = local_search_ring(limits, span.way or relaxed_route(limits, found))
            self._work += 2 * work
            if way is not None:
                span.way = way
                self._offered(way, span, limits.chain)
                if route_lap(limits.chain, way)[0] <= ring:
                    return found.value, way
            if count > LARGEST_STATES:
                return found.value, None
        way = least_ring(limits, found, ring)
        return (np.inf if way is None else route_lap(limits.chain, way)[0]), way
