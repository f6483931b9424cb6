"""The cheapest walk over every place of the head: places are refuted or searched until none is left."""

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

EXACT = 1e-10  # relative; two ways closer than this are one
FEW = 16  # devices up to which the search goes on until it is exact, within reason
WIDTHS = {True: (48, 400, 4000, 40_000), False: (48, 400)}  # ways per block, for few devices and for many
BUDGET = {True: 300_000_000, False: 80_000_000}  # array elements touched before the rest is left open
UNMET = 0.1  # of that, while no way is met: the search for any layers finds one sooner
STRIDE = 0.3  # of the way from the bound to the best that is tried next
NEAR = 0.01  # relative; further from the best, bounds are raised half of the way at once: the lowest one is what counts
CLOSE = 1e-4  # relative; so close to the best, all that is better is tried at once


@dataclass(order=True, slots=True)
class _OpenPosition:
    bound: float
    turn: int
    house: HeadPosition = field(compare=False)
    found: RouteBound = field(compare=False)
    tried: float = field(compare=False, default=np.inf)
    ascended: bool = field(compare=False, default=False)
    strict: bool = field(compare=False, default=False)


class HeadSearch:
    """`best` and `homes` are the best way met; `bound` what no way can beat, once `run` has returned."""

    def __init__(self, blocks: EqualBlocks, cost_of: Callable[[tuple[int, ...]], float]) -> None:
        self.best, self.homes = np.inf, ()  # type: tuple[float, tuple[int, ...]]
        self.bound = np.inf
        self._cost_of = cost_of
        self._few = sum(map(len, blocks.members)) <= FEW
        self._work = 0
        self._turn = 0
        self._heap: list[_OpenPosition] = []
        every = head_positions(blocks)
        for house in every:
            if np.isfinite(source_only_cost(house)):
                self._offer(house, (Visit(-1, blocks.blocks),))
        if len(blocks.each) > 1 and every:
            self._open(blocks, every)

    def _open(self, blocks: EqualBlocks, every: list[HeadPosition]) -> None:
        """First bounds for every place, from prices that suit them all, and a first good walk."""
        start = any_head_position(blocks)
        starts = [raise_bound(start, price, 1e300) for price in initial_prices(start)]
        found = max((found for found, _, _ in starts), key=lambda found: found.value)
        self._work += sum(passes for _, _, passes in starts) * _size(start)
        if not np.isfinite(found.value):
            return
        for house in every:
            parted = found.price[[house.tail_of - 1]][: len(house.blocks.each) - len(blocks.each)]
            self._work += _size(house.limits)
            self._push(_OpenPosition(0.0, 0, house, route_bound(house.limits, np.append(found.price, parted))))
        hopeful = [visit.kind + 1 for visit in relaxed_route(start, found)[1:]]
        self._wander(hopeful)

    def _wander(self, hopeful: list[int]) -> None:
        """A first good walk, and what relays could make of it."""
        places = sorted(self._heap)
        searches = [OrderSearch(block_ring(place.house)) for place in places]
        good = iterated_local_search(searches, hopeful)
        self._work += 2 * sum(search.work for search in searches)
        if good is None:
            return
        search, order = good
        place = places[searches.index(search)]
        kinds, ends = np.append(0, order) - 1, search.dealt(order).cumsum()
        self._offer(place.house, tuple(Visit(int(kind), int(end)) for kind, end in zip(kinds, ends, strict=True)))
        way, _, work = set_labels(place.house, place.found, self.best * (1 - EXACT), WIDTHS[True][0], strict=True)
        self._work += work
        if way is not None:
            self._offer(place.house, way)

    def run(self) -> None:
        """Until the best is proven, nothing is left to try, or the budget is spent."""
        left = np.inf
        while self._heap:
            place = heapq.heappop(self._heap)
            if place.bound >= self.best * (1 - EXACT):
                break
            if self.spent or not self._advance(place):
                left = min(left, place.bound)
        self.bound = min(left, self.best)

    @property
    def spent(self) -> bool:
        """Whether it ended for lack of budget."""
        return self._work > BUDGET[self._few] * (1.0 if self.homes else UNMET)

    def _push(self, place: _OpenPosition) -> None:
        place.bound = max(place.bound, place.found.value)
        place.turn = self._turn = self._turn + 1
        if np.isfinite(place.bound):
            heapq.heappush(self._heap, place)

    def _advance(self, place: _OpenPosition) -> bool:
        """Look for a walk at this place or raise its bound; False if it must be left open."""
        limits = place.house.limits
        if np.isfinite(self.best) and not place.ascended:
            goal = self.best if self.best - place.bound < NEAR * self.best else (place.bound + self.best) / 2
            found, way, passes = raise_bound(limits, place.found.price, goal)
            self._work += passes * _size(limits)
            place.found, place.ascended = found, found.value <= goal
            if way is not None:
                self._offer(place.house, way)
            self._push(place)
            return True
        top = min(self.best * (1 - EXACT), place.tried)
        near = np.isfinite(top) and top - place.bound <= CLOSE * top
        goal = top if near or np.isinf(top) else place.bound + STRIDE * (top - place.bound)
        for width in WIDTHS[self._few]:
            way, whole, work = set_labels(place.house, place.found, goal, width, strict=place.strict)
            self._work += work
            if way is not None and not self._offer(place.house, way):
                if place.strict:
                    return False  # two relays over one device with two blocks
                place.strict = True
                self._push(place)
                return True
            if way is not None or whole:
                place.bound = max(place.bound, goal) if way is None else place.bound
                if np.isfinite(place.bound):
                    self._push(place)
                return True
        place.tried = goal
        if near or np.isinf(goal) or goal - place.bound <= CLOSE * goal:
            return False
        self._push(place)
        return True

    def _offer(self, house: HeadPosition, way: Route) -> bool:
        """False if its relays have too few blocks to hand out; then the way without any is taken."""
        real = placement_of_route(house, way)
        homes = real if real is not None else placement_of_route(house, way, relays=False)
        if homes is not None and (cost := self._cost_of(homes)) < self.best:
            self.best, self.homes = cost, homes
        return real is not None


def _size(limits: CappedRoutes) -> int:
    """Array elements that one bound touches, or what takes as long."""
    return (limits.chain.hop.size + limits.chain.first.size * 40) // 2
