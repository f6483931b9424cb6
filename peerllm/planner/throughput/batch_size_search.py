"""Branch and bound over micro-batch sizes: intervals of sizes are refuted, split or searched until none is left.

All figures are milliseconds per token: max(bottleneck, ring / micro-batches) / batch, the inverse of EdgeShard's
no-bubble rate. An interval is bounded by costs that no size in it can beat.
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

EXACT = 1e-10  # relative; plans closer than this count as equal
SMALL = 2_000_000  # layers × classes² × subsets up to which the subset DP is quicker than raising the bound
LARGEST_STATES = 1 << 16  # subsets of used devices up to which the subset DP is tried
WIDTHS = (48, 400)  # labels per layer of the beam search, in turn
BUDGET = 150_000_000  # array elements touched; afterwards intervals stay open, with their bounds
STRIDE = 0.3  # the next cutoff lies so far from the bound towards the best
CLOSE = 1e-4  # relative; with so small a gap the cutoff is the best itself
NARROW = 0.004  # relative; an interval with so small a gap to a cutoff that was not refuted stays open
BISECTIONS = 12


@dataclass(order=True, slots=True)
class _Interval:
    """Micro-batch sizes low..high with one place of the head; `bound` is proven, nothing was found below `tried`."""

    bound: float
    turn: int
    low: int = field(compare=False)
    high: int = field(compare=False)
    head_home: bool = field(compare=False)
    price: Floats | None = field(compare=False, default=None)
    tried: float = field(compare=False, default=np.inf)
    rounds: int = field(compare=False, default=0)
    route: Route = field(compare=False, default=())  # the last one found: the local search starts from its devices


class BatchSizeSearch:
    """`best` is the best ring found; no ring can beat `bound` once `run` has returned."""

    def __init__(self, tables: ClassTables, sequences: int, offer: Callable[[Route, bool], float], best: float) -> None:
        self.best = self.bound = best
        self._tables, self._sequences, self._offer = tables, sequences, offer
        self._graphs: dict[tuple[int, int, bool], RouteGraph | None] = {}
        self._heap: list[_Interval] = []
        self._turns = self._work = 0

    def run(self, places: tuple[bool, ...]) -> None:
        """`places`: for each place of the head to try, whether that is the source."""
        for head_home in places:
            self._push(_Interval(0.0, 0, 1, self._sequences, head_home))
        left = np.inf
        while self._heap:
            interval = heapq.heappop(self._heap)
            if interval.bound >= self.best * (1 - EXACT):
                break
            graph = self._graph(interval)
            if graph is None or not len(graph.class_size):
                continue
            if interval.rounds == 0:
                interval.bound = max(interval.bound, self._floor(interval, graph))
                interval.rounds = 1
                self._push(interval)
            elif interval.low < interval.high:
                self._split(interval, graph)
            elif (
                self._work > BUDGET * self._scale()
                or interval.tried - interval.bound <= NARROW * interval.tried < np.inf
            ):
                left = min(left, interval.bound)
            else:
                self._search_size(interval, graph)
        self.bound = min(left, self.best)

    def _scale(self) -> float:
        """Small problems get no work limit: their searches end by themselves."""
        return 1.0 if subset_count(self._tables.class_size) > LARGEST_STATES else np.inf

    def _push(self, interval: _Interval) -> None:
        self._turns += 1
        interval.turn = self._turns
        heapq.heappush(self._heap, interval)

    def _graph(self, interval: _Interval) -> RouteGraph | None:
        key = (interval.low, interval.high, interval.head_home)
        if key not in self._graphs:
            self._graphs[key] = self._tables.graph(*key)
        return self._graphs[key]

    def _cutoffs(self, interval: _Interval, ms_per_token: float) -> tuple[float, float]:
        """(bottleneck, ring) of a ring that needs `ms_per_token`, at most."""
        return ms_per_token * interval.high, ms_per_token * interval.high * (self._sequences // interval.low)

    def _floor(self, interval: _Interval, graph: RouteGraph) -> float:
        """A first bound: the cheapest route with repeated visits allowed, and capacity for all layers."""
        self._work += graph.hop.size
        free = route_bound(capped(graph, np.inf), np.zeros(len(graph.class_size))).value
        if not np.isfinite(free):
            return np.inf
        low = free / (interval.high * (self._sequences // interval.low))
        high = free / interval.high
        if not enough_capacity(capped(graph, np.inf)):
            return np.inf
        while not enough_capacity(capped(graph, high * interval.high)):
            low, high = high, 2 * high + 1e-9
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if enough_capacity(capped(graph, middle * interval.high)):
                high = middle
            else:
                low = middle
        return low

    def _split(self, interval: _Interval, graph: RouteGraph) -> None:
        slowest, _ = self._cutoffs(interval, self.best * (1 - EXACT))
        if np.isfinite(self.best) and not enough_capacity(capped(graph, slowest)):
            return
        middle = (interval.low + interval.high) // 2
        for low, high in ((interval.low, middle), (middle + 1, interval.high)):
            self._push(_Interval(interval.bound, 0, low, high, interval.head_home, interval.price))

    def _ceiling(self, graph: RouteGraph) -> float:
        """An upper bound on the cost of any ring."""
        slow = np.where(np.isfinite(graph.hop), graph.hop, 0.0).max(axis=(1, 2)).sum()
        home = np.where(np.isfinite(graph.home), graph.home, 0.0).max(initial=0.0)
        first = np.where(np.isfinite(graph.first), graph.first, 0.0).max()
        return float(first + slow + home + graph.prefix[:, -1].max(initial=0.0) * (graph.last + 1) + 1.0)

    def _search_size(self, interval: _Interval, graph: RouteGraph) -> None:
        """Search one size for a ring at or below some milliseconds per token, or prove that there is none."""
        top = min(self.best * (1 - EXACT), interval.tried)
        first = interval.rounds == 1
        if np.isinf(top):
            ms_per_token = self._ceiling(graph) / interval.high
        elif first or top - interval.bound <= CLOSE * top:
            ms_per_token = top
        else:
            # Cutoffs just above the bound are cheap to refute, and a route found below one leaves little to prove.
            ms_per_token = interval.bound + STRIDE * (top - interval.bound)
        interval.rounds += 1
        slowest, ring = self._cutoffs(interval, ms_per_token)
        floor, route = self._search_capped(
            interval, capped(graph, slowest), ring, bounds_only=first and np.isfinite(top)
        )
        # A ring either breaks the bottleneck limit, and so exceeds the cutoff, or is at least as long as the floor.
        interval.bound = max(interval.bound, min(ms_per_token, floor / ring * ms_per_token))
        if route is not None:
            self._accept(route, interval, graph)
        elif floor < ring:
            interval.tried = interval.tried if first else ms_per_token
        elif np.isinf(self.best):
            return  # there is no ring at all
        self._push(interval)

    def _accept(self, route: Route, interval: _Interval, graph: RouteGraph) -> None:
        ring, slowest = route_lap(graph, route)
        ms_per_token = max(slowest, ring / (self._sequences // interval.low)) / interval.low
        self.best = min(self.best, ms_per_token, self._offer(route, interval.head_home))

    def _search_capped(
        self, interval: _Interval, routes: CappedRoutes, ring: float, bounds_only: bool
    ) -> tuple[float, Route | None]:
        """(a lower bound on every ring within the limits, a route of at most `ring` if one was found)."""
        class_size = routes.graph.class_size
        if not enough_capacity(routes):
            return np.inf, None
        price = interval.price if interval.price is not None else initial_price(routes)
        count = subset_count(class_size)
        quick = routes.graph.hop.size * count <= SMALL
        relaxed, route, steps = raise_bound(routes, price, ring, 8 if quick else STEPS)
        self._work += steps * (routes.graph.hop.size + routes.graph.first.size * 40)
        interval.price = relaxed.price
        if not relaxed.value <= ring:
            return np.inf, None
        if not quick:
            if route is not None:
                return relaxed.value, route
            if bounds_only:
                return relaxed.value, None
            for width in WIDTHS:
                route, complete, work = beam_search(routes, relaxed, ring, width)
                self._work += work
                if complete:
                    return (np.inf if route is None else route_lap(routes.graph, route)[0]), route
                if route is not None:
                    interval.route = route
                    return relaxed.value, route
            route, work = local_search_ring(routes, interval.route or relaxed_route(routes, relaxed))
            self._work += 2 * work
            if route is not None:
                interval.route = route
                self._accept(route, interval, routes.graph)
                if route_lap(routes.graph, route)[0] <= ring:
                    return relaxed.value, route
            if count > LARGEST_STATES:
                return relaxed.value, None
        route = least_ring(routes, relaxed, ring)
        return (np.inf if route is None else route_lap(routes.graph, route)[0]), route
