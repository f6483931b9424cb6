"""Lagrangian relaxation of routes: devices may be visited any number of times, at a price per visit.

Its optimum is a lower bound on every route that uses each device once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.arrays import Floats
from peerllm.planner.routing.bundle_method import BundleMethod
from peerllm.planner.routing.route_graph import CappedRoutes, Route, Visit

STEPS = 120  # bounds computed at most


@dataclass(frozen=True, slots=True)
class RouteBound:
    """The relaxed optimum under some prices; costs are infinite where no route leads on."""

    price: Floats  # [classes]
    visit: Floats  # [last + 2, classes]: cost to go when entering a device at layer i, its price included
    leave: Floats  # [1 + classes, last + 1]: cost to go when leaving a device after layer i
    value: float  # the bound on any ring

    def refund(self, class_size: Floats) -> float:
        """The prices that a route without any device would get back."""
        return float(self.price @ class_size)


class RouteRelaxation:
    """Computes the bound under any prices; what does not depend on prices is prepared once."""

    def __init__(self, routes: CappedRoutes) -> None:
        graph, last = routes.graph, routes.last
        layers = np.arange(last + 1)
        width = max(1, int((routes.far - layers).max(initial=0)) + 1)
        ends = layers[:, None] + np.arange(width)  # [layers, width]
        self._routes, self._width = routes, width
        # [layers, width, classes]: 0 where a visit that starts here may end there, else infinite.
        self._closed = np.where(ends[:, :, None] <= routes.far.T[:, None, :], 0.0, np.inf)
        if routes.hop.strides[0] == 0:  # a broadcast view: equal at every layer, kept once
            onward = np.ascontiguousarray(routes.hop[0].T)
            self._onward: Floats = np.broadcast_to(onward, (last + 1, *onward.shape))
        else:
            self._onward = np.ascontiguousarray(routes.hop.transpose(0, 2, 1))
        self._prefix = np.ascontiguousarray(graph.prefix.T)

    def __call__(self, price: Floats) -> RouteBound:
        """The bound under `price`, by dynamic programming from the last layer back."""
        graph, last, width = self._routes.graph, self._routes.last, self._width
        kinds = len(price)
        visit = np.full((last + 2, kinds), np.inf)
        leave = np.full((last + 1, 1 + kinds), np.inf)
        leave[last, 1:] = self._routes.home
        ending = np.full((last + 1, kinds), np.inf)  # prefix up to and including a layer, plus the cost to go
        entering = price - self._prefix
        for i in range(last, -1, -1):
            if i < last:
                (self._onward[i] + visit[i + 1][:, None]).min(axis=0, out=leave[i])
            np.add(self._prefix[i + 1], leave[i, 1:], out=ending[i])
            window = ending[i : i + width]
            np.add((window + self._closed[i, : len(window)]).min(axis=0), entering[i], out=visit[i])
        total = float((self._routes.first + leave[:, 0]).min())
        return RouteBound(price, visit, leave.T, total - float(price @ graph.class_size))


def route_bound(routes: CappedRoutes, price: Floats) -> RouteBound:
    """The bound under one price vector."""
    return RouteRelaxation(routes)(price)


def relaxed_route(routes: CappedRoutes, relaxed: RouteBound) -> Route:
    """A cheapest relaxed route. Call it only where `value` is finite."""
    graph, last = routes.graph, routes.last
    route = [Visit(-1, int((routes.first + relaxed.leave[0]).argmin()))]
    while route[-1].last < last:
        i = route[-1].last + 1
        kind = int((routes.hop[i - 1, route[-1].kind + 1] + relaxed.visit[i]).argmin())
        end = routes.far[kind, i] + 1
        cost = graph.prefix[kind, i + 1 : end + 1] + relaxed.leave[kind + 1, i:end]
        route.append(Visit(kind, i + int(cost.argmin())))
    return tuple(route)


def visit_counts(route: Route, kinds: int) -> Floats:
    """[classes]: how often the route visits each class."""
    count: Floats = np.bincount([visit.kind for visit in route[1:]], minlength=kinds).astype(float)
    return count


def initial_price(routes: CappedRoutes) -> Floats:
    """The better of `initial_prices`."""
    return max(initial_prices(routes), key=lambda price: route_bound(routes, price).value)


def initial_prices(routes: CappedRoutes) -> tuple[Floats, Floats]:
    """Two starting prices: what one visit saves against the slowest device that is still needed.

    Layers fill the fastest devices first. The cost of a hop is a guess: half of the mean, or the shortest.
    """
    graph = routes.graph
    open_ = np.isfinite(graph.hop)
    usual = np.where(open_, graph.hop, 0.0).sum(axis=(0, 1)) / np.maximum(open_.sum(axis=(0, 1)), 1) / 2
    shortest = graph.hop.min(axis=(0, 1), initial=np.inf)
    return _price_against_slowest(routes, usual), _price_against_slowest(
        routes, np.where(np.isfinite(shortest), shortest, 0.0)
    )


def _price_against_slowest(routes: CappedRoutes, hops: Floats) -> Floats:
    graph, last = routes.graph, routes.last
    room = np.maximum((routes.far - np.arange(last + 1) + 1).max(axis=1), 0)
    cost = room * graph.prefix[:, -1] / (last + 1) + hops
    pace = np.where(room > 0, cost / np.maximum(room, 1), np.inf)
    own = np.flatnonzero(np.isfinite(routes.first))
    left, dearest = last - int(own.max(initial=0)), 0.0
    for kind in np.argsort(pace):
        if np.isinf(pace[kind]):
            break
        dearest = float(pace[kind])
        left -= int(room[kind] * graph.class_size[kind])
        if left <= 0:
            break
    price: Floats = np.maximum(0.0, room * dearest - np.where(room > 0, cost, 0.0))
    return price


def raise_bound(
    routes: CappedRoutes, price: Floats, cutoff: float, steps: int = STEPS
) -> tuple[RouteBound, Route | None, int]:
    """Raise the bound until it exceeds `cutoff` (refuted), a route visits no class too often, or it grows no more.

    Returns the best bound, a feasible route of at most `cutoff` if one was met, and how many bounds were computed.
    """
    class_size = routes.graph.class_size
    route: Route = ()

    def judge(relaxed: RouteBound) -> tuple[Floats, bool]:
        nonlocal route
        route = relaxed_route(routes, relaxed)
        count = visit_counts(route, len(class_size))
        good = (
            bool((count <= class_size).all()) and relaxed.value + float(relaxed.price @ (class_size - count)) <= cutoff
        )
        return count - class_size, good

    relaxed, good, passes = BundleMethod(RouteRelaxation(routes), judge).maximise(price, cutoff, steps)
    return relaxed, (route if good else None), passes
