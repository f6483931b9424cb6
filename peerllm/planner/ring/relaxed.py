"""Relaxed ways: devices may be visited again, at a price. A lower bound on every lap (Lagrangian relaxation)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.ascent import Ascent
from peerllm.planner.relaxation import Floats
from peerllm.planner.ring.chain import Limits, Visit, Way

STEPS = 120  # of subgradient ascent


@dataclass(frozen=True, slots=True)
class Relaxed:
    """Under prices per visit of each class; costs are infinite where no way leads on."""

    price: Floats  # [classes]
    visit: Floats  # [last + 2, classes]: from entering a device at layer i, its price included, until home
    leave: Floats  # [1 + classes, last + 1]: from leaving a device after layer i until home
    value: float  # the bound on any ring

    def refund(self, many: Floats) -> float:
        """Prices that a way using no device at all would get back."""
        return float(self.price @ many)


def relaxed(limits: Limits, price: Floats) -> Relaxed:
    """The bound under `price`, by dynamic programming from the last layer back."""
    chain, last = limits.chain, limits.last
    kinds = len(price)
    visit = np.full((last + 2, kinds), np.inf)
    leave = np.full((1 + kinds, last + 1), np.inf)
    leave[1:, last] = limits.home
    ending = np.full((kinds, last + 1), np.inf)  # prefix up to and with a layer, plus what follows
    layers = np.arange(last + 1)
    width = max(1, int((limits.far - layers).max()) + 1)
    for i in range(last, -1, -1):
        if i < last:
            leave[:, i] = (limits.hop[i] + visit[i + 1]).min(axis=1)
        ending[:, i] = chain.prefix[:, i + 1] + leave[1:, i]
        window = ending[:, i : i + width]
        held = np.where(layers[i : i + width] <= limits.far[:, i, None], window, np.inf)
        visit[i] = held.min(axis=1) - chain.prefix[:, i] + price
    total = float((limits.first + leave[0]).min())
    return Relaxed(price, visit, leave, total - float(price @ chain.many))


def way_of(limits: Limits, found: Relaxed) -> Way:
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


def visits(way: Way, kinds: int) -> Floats:
    """How often each class is visited."""
    count: Floats = np.bincount([visit.kind for visit in way[1:]], minlength=kinds).astype(float)
    return count


def fair_price(limits: Limits) -> Floats:
    """What one visit saves against the slowest device needed if layers simply fill the fastest first."""
    chain, last = limits.chain, limits.last
    room = np.maximum((limits.far - np.arange(last + 1) + 1).max(axis=1), 0)
    open_ = np.isfinite(limits.hop)
    hops = np.where(open_, limits.hop, 0.0).sum(axis=(0, 1)) / np.maximum(open_.sum(axis=(0, 1)), 1)
    cost = room * chain.prefix[:, -1] / (last + 1) + hops / 2
    pace = np.where(room > 0, cost / np.maximum(room, 1), np.inf)
    left, dearest = last + 1, 0.0
    for kind in np.argsort(pace):
        if np.isinf(pace[kind]):
            break
        dearest = float(pace[kind])
        left -= int(room[kind] * chain.many[kind])
        if left <= 0:
            break
    price: Floats = np.maximum(0.0, room * dearest - np.where(room > 0, cost, 0.0))
    return price


def ascend(limits: Limits, price: Floats, goal: float, steps: int = STEPS) -> tuple[Relaxed, Way | None, int]:
    """Raise the bound until it passes `goal` (refuted), a way respects every count, or it grows no more.

    Returns the best bound, a way of at most `goal` if one was met, and the passes it took.
    """
    many = limits.chain.many
    way: Way = ()

    def judge(found: Relaxed) -> tuple[Floats, bool]:
        nonlocal way
        way = way_of(limits, found)
        count = visits(way, len(many))
        good = bool((count <= many).all()) and found.value + float(found.price @ (many - count)) <= goal
        return count - many, good

    found, good, passes = Ascent(lambda price: relaxed(limits, price), judge).climb(price, goal, steps)
    return found, (way if good else None), passes
