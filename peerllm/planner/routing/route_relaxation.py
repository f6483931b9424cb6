"""Relaxed ways: devices may be visited again, at a price. A lower bound on every lap (Lagrangian relaxation)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.arrays import Floats
from peerllm.planner.routing.bundle_method import BundleMethod
from peerllm.planner.routing.route_graph import CappedRoutes, Route, Visit

STEPS = 120  # of subgradient ascent


@dataclass(frozen=True, slots=True)
class RouteBound:
    """Under prices per visit of each class; costs are infinite where no way leads on."""

    price: Floats  # [classes]
    visit: Floats  # [last + 2, classes]: from entering a device at layer i, its price included, until home
    leave: Floats  # [1 + classes, last + 1]: from leaving a device after layer i until home
    value: float  # the bound on any ring

    def refund(self, many: Floats) -> float:
        """Prices that a way using no device at all would get back."""
        return float(self.price @ many)


class RouteRelaxation:
    """What bounds under any prices share: computed once for many of them."""

    def __init__(self, limits: CappedRoutes) -> None:
        chain, last = limits.chain, limits.last
        layers = np.arange(last + 1)
        width = max(1, int((limits.far - layers).max(initial=0)) + 1)
        ends = layers[:, None] + np.arange(width)  # [layers, width]
        self._limits, self._width = limits, width
        # [layers, width, classes]: whether a visit that starts here may end there; what is behind `last` is cut off.
        self._closed = np.where(ends[:, :, None] <= limits.far.T[:, None, :], 0.0, np.inf)
        if limits.hop.strides[0] == 0:  # alike at every layer: held once
            onward = np.ascontiguousarray(limits.hop[0].T)
            self._onward: Floats = np.broadcast_to(onward, (last + 1, *onward.shape))
        else:
            self._onward = np.ascontiguousarray(limits.hop.transpose(0, 2, 1))
        self._prefix = np.ascontiguousarray(chain.prefix.T)

    def __call__(self, price: Floats) -> RouteBound:
        """The bound under `price`, by dynamic programming from the last layer back."""
        chain, last, width = self._limits.chain, self._limits.last, self._width
        kinds = len(price)
        visit = np.full((last + 2, kinds), np.inf)
        leave = np.full((last + 1, 1 + kinds), np.inf)
        leave[last, 1:] = self._limits.home
        ending = np.full((last + 1, kinds), np.inf)  # prefix up to and with a layer, plus what follows
        entering = price - self._prefix
        for i in range(last, -1, -1):
            if i < last:
                (self._onward[i] + visit[i + 1][:, None]).min(axis=0, out=leave[i])
            np.add(self._prefix[i + 1], leave[i, 1:], out=ending[i])
            window = ending[i : i + width]
            np.add((window + self._closed[i, : len(window)]).min(axis=0), entering[i], out=visit[i])
        total = float((self._limits.first + leave[:, 0]).min())
        return RouteBound(price, visit, leave.T, total - float(price @ chain.many))


def route_bound(limits: CappedRoutes, price: Floats) -> RouteBound:
    """The bound under one price."""
    return RouteRelaxation(limits)(price)


def relaxed_route(limits: CappedRoutes, found: RouteBound) -> Route:
    """A cheapest relaxed way; call only where `value` is finite."""
    chain, last = limits.chain, limits.last
    way = [Visit(-1, int((limits.first + found.leave[0]).argmin()))]
    while way[-1].last < last:
        i = way[-1].last + 1
        kind = int((limits.hop[i - 1, way[-1].kind + 1] + found.visit[i]).argmin())
        end = limits.far[kind, i] + 1
        cost = chain.prefix[kind, i + 1 : end + 1] + found.leave[kind + 1, i:end]
        way.append(Visit(kind, i + int(cost.argmin())))
    return tuple(way)


def visit_counts(way: Route, kinds: int) -> Floats:
    """How often each class is visited."""
    count: Floats = np.bincount([visit.kind for visit in way[1:]], minlength=kinds).astype(float)
    return count


def initial_price(limits: CappedRoutes) -> Floats:
    """The better of `fair_prices`."""
    return max(initial_prices(limits), key=lambda price: route_bound(limits, price).value)


def initial_prices(limits: CappedRoutes) -> tuple[Floats, Floats]:
    """What one visit saves against the slowest device needed if layers simply fill the fastest first: two starts.

    What a hop costs is a guess: half of the usual one, or the shortest into a device.
    """
    chain = limits.chain
    open_ = np.isfinite(chain.hop)
    usual = np.where(open_, chain.hop, 0.0).sum(axis=(0, 1)) / np.maximum(open_.sum(axis=(0, 1)), 1) / 2
    shortest = chain.hop.min(axis=(0, 1), initial=np.inf)
    return _price_against_slowest(limits, usual), _price_against_slowest(
        limits, np.where(np.isfinite(shortest), shortest, 0.0)
    )


def _price_against_slowest(limits: CappedRoutes, hops: Floats) -> Floats:
    chain, last = limits.chain, limits.last
    room = np.maximum((limits.far - np.arange(last + 1) + 1).max(axis=1), 0)
    cost = room * chain.prefix[:, -1] / (last + 1) + hops
    pace = np.where(room > 0, cost / np.maximum(room, 1), np.inf)
    own = np.flatnonzero(np.isfinite(limits.first))
    left, dearest = last - int(own.max(initial=0)), 0.0
    for kind in np.argsort(pace):
        if np.isinf(pace[kind]):
            break
        dearest = float(pace[kind])
        left -= int(room[kind] * chain.many[kind])
        if left <= 0:
            break
    price: Floats = np.maximum(0.0, room * dearest - np.where(room > 0, cost, 0.0))
    return price


def raise_bound(
    limits: CappedRoutes, price: Floats, goal: float, steps: int = STEPS
) -> tuple[RouteBound, Route | None, int]:
    """Raise the bound until it passes `goal` (refuted), a way respects every count, or it grows no more.

    Returns the best bound, a way of at most `goal` if one was met, and the passes it took.
    """
    many = limits.chain.many
    way: Route = ()

    def judge(found: RouteBound) -> tuple[Floats, bool]:
        nonlocal way
        way = relaxed_route(limits, found)
        count = visit_counts(way, len(many))
        good = bool((count <= many).all()) and found.value + float(found.price @ (many - count)) <= goal
        return count - many, good

    found, good, passes = BundleMethod(RouteRelaxation(limits), judge).climb(price, goal, steps)
    return found, (way if good else None), passes
