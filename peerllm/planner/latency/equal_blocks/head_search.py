"""Branch and bound over the position of the head: positions are refuted or searched until none is left."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from peerllm.planner.latency.equal_blocks.block_label_setting import set_labels
from peerllm.planner.latency.equal_blocks.block_placement import placement_of_route
from peerllm.planner.latency.equal_blocks.block_problem import EqualBlocks
from peerllm.planner.latency.equal_blocks.head_position import (
    HeadPosition,
    any_head_position,
    block_ring,
    head_positions,
    source_only_cost,
)
from peerllm.planner.routing.order_search import OrderSearch, iterated_local_search
from peerllm.planner.routing.route_graph import CappedRoutes, Route, Visit
from peerllm.planner.routing.route_relaxation import RouteBound, initial_prices, raise_bound, relaxed_route, route_bound

EXACT = 1e-10  # relative; routes closer than this count as equal
FEW = 16  # devices up to which the wider label limits and the larger budget are used
WIDTHS = {True: (48, 400, 4000, 40_000), False: (48, 400)}  # labels per block in turn, for few devices or many
BUDGET = {True: 300_000_000, False: 80_000_000}  # array elements touched before positions stay open
UNMET = 0.1  # of the budget while no route is found: the search for mixed layers finds one sooner
STRIDE = 0.3  # the next cutoff lies so far from the bound towards the best
NEAR = 0.01  # relative; with a larger gap the bound is first raised half of the way: only the lowest position counts
CLOSE = 1e-4  # relative; with so small a gap the cutoff is the best itself


@dataclass(order=True, slots=True)
class _OpenPosition:
    """A head position that may still hold a better route; nothing was found there below `tried`."""

    bound: float
    turn: int
    position: HeadPosition = field(compare=False)
    relaxed: RouteBound = field(compare=False)
    tried: float = field(compare=False, default=np.inf)
    ascended: bool = field(compare=False, default=False)
    strict: bool = field(compare=False, default=False)


class HeadSearch:
    """`best` and `placement` are the best found; no placement can beat `bound` once `run` has returned."""

    def __init__(self, blocks: EqualBlocks, cost_of: Callable[[tuple[int, ...]], float]) -> None:
        self.best, self.placement = np.inf, ()  # type: tuple[float, tuple[int, ...]]
        self.bound = np.inf
        self._cost_of = cost_of
        self._few = sum(map(len, blocks.members)) <= FEW
        self._work = 0
        self._turn = 0
        self._heap: list[_OpenPosition] = []
        every = head_positions(blocks)
        for position in every:
            if np.isfinite(source_only_cost(position)):
                self._offer(position, (Visit(-1, blocks.blocks),))
        if len(blocks.block_cost) > 1 and every:
            self._open(blocks, every)

    def _open(self, blocks: EqualBlocks, every: list[HeadPosition]) -> None:
        """First bounds for all positions from shared prices, and a first good route."""
        start = any_head_position(blocks)
        starts = [raise_bound(start, price, 1e300) for price in initial_prices(start)]
        relaxed = max((relaxed for relaxed, _, _ in starts), key=lambda relaxed: relaxed.value)
        self._work += sum(passes for _, _, passes in starts) * _size(start)
        if not np.isfinite(relaxed.value):
            return
        for position in every:
            parted = relaxed.price[[position.unsplit_class - 1]][
                : len(position.blocks.block_cost) - len(blocks.block_cost)
            ]
            self._work += _size(position.routes)
            self._push(_OpenPosition(0.0, 0, position, route_bound(position.routes, np.append(relaxed.price, parted))))
        promising = [visit.kind + 1 for visit in relaxed_route(start, relaxed)[1:]]
        self._local_search(promising)

    def _local_search(self, promising: list[int]) -> None:
        """Find a good route by local search, then improve it with relays."""
        candidates = sorted(self._heap)
        searches = [OrderSearch(block_ring(candidate.position)) for candidate in candidates]
        good = iterated_local_search(searches, promising)
        self._work += 2 * sum(search.work for search in searches)
        if good is None:
            return
        search, order = good
        candidate = candidates[searches.index(search)]
        kinds, ends = np.append(0, order) - 1, search.blocks_per_visit(order).cumsum()
        self._offer(
            candidate.position, tuple(Visit(int(kind), int(end)) for kind, end in zip(kinds, ends, strict=True))
        )
        route, _, work = set_labels(
            candidate.position, candidate.relaxed, self.best * (1 - EXACT), WIDTHS[True][0], strict=True
        )
        self._work += work
        if route is not None:
            self._offer(candidate.position, route)

    def run(self) -> None:
        """Search until the best is proven, no position is left to try, or the budget is spent."""
        left = np.inf
        while self._heap:
            candidate = heapq.heappop(self._heap)
            if candidate.bound >= self.best * (1 - EXACT):
                break
            if self.spent or not self._advance(candidate):
                left = min(left, candidate.bound)
        self.bound = min(left, self.best)

    @property
    def spent(self) -> bool:
        """Whether the work exceeds the budget."""
        return self._work > BUDGET[self._few] * (1.0 if self.placement else UNMET)

    def _push(self, candidate: _OpenPosition) -> None:
        candidate.bound = max(candidate.bound, candidate.relaxed.value)
        candidate.turn = self._turn = self._turn + 1
        if np.isfinite(candidate.bound):
            heapq.heappush(self._heap, candidate)

    def _advance(self, candidate: _OpenPosition) -> bool:
        """Search this position for a route, or raise its bound; False if it must stay open."""
        routes = candidate.position.routes
        if np.isfinite(self.best) and not candidate.ascended:
            cutoff = self.best if self.best - candidate.bound < NEAR * self.best else (candidate.bound + self.best) / 2
            relaxed, route, passes = raise_bound(routes, candidate.relaxed.price, cutoff)
            self._work += passes * _size(routes)
            candidate.relaxed, candidate.ascended = relaxed, relaxed.value <= cutoff
            if route is not None:
                self._offer(candidate.position, route)
            self._push(candidate)
            return True
        top = min(self.best * (1 - EXACT), candidate.tried)
        close = np.isfinite(top) and top - candidate.bound <= CLOSE * top
        cutoff = top if close or np.isinf(top) else candidate.bound + STRIDE * (top - candidate.bound)
        for width in WIDTHS[self._few]:
            route, complete, work = set_labels(
                candidate.position, candidate.relaxed, cutoff, width, strict=candidate.strict
            )
            self._work += work
            if route is not None and not self._offer(candidate.position, route):
                if candidate.strict:
                    return False  # two relays share a device that holds only two blocks
                candidate.strict = True
                self._push(candidate)
                return True
            if route is not None or complete:
                candidate.bound = max(candidate.bound, cutoff) if route is None else candidate.bound
                if np.isfinite(candidate.bound):
                    self._push(candidate)
                return True
        candidate.tried = cutoff
        if close or np.isinf(cutoff) or cutoff - candidate.bound <= CLOSE * cutoff:
            return False
        self._push(candidate)
        return True

    def _offer(self, position: HeadPosition, route: Route) -> bool:
        """Keep the route if it is the best. False if its relays lack blocks: then the route without relays is kept."""
        real = placement_of_route(position, route)
        placement = real if real is not None else placement_of_route(position, route, relays=False)
        if placement is not None and (cost := self._cost_of(placement)) < self.best:
            self.best, self.placement = cost, placement
        return real is not None


def _size(routes: CappedRoutes) -> int:
    """The work of computing one bound, in array elements."""
    return (routes.graph.hop.size + routes.graph.first.size * 40) // 2
