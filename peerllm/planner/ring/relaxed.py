"""Relaxed ways: devices may be visited again, at a price. A lower bound on every lap (Lagrangian relaxation)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.relaxation import Floats
from peerllm.planner.ring.chain import Limits, Visit, Way

STEPS = 60  # of subgradient ascent
PATIENCE = 6  # steps without a better bound before the pace is halved
LEAST_PACE = 0.02


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


def ascend(limits: Limits, price: Floats, goal: float, steps: int = STEPS) -> tuple[Relaxed, Way | None, int]:
    """Raise the bound until it passes `goal` (refuted), a way respects every count, or it grows no more.

    Returns the best bound, such a way of at most `goal` if one was met, and the passes it took.
    """
    many = limits.chain.many
    kept = found = relaxed(limits, price)
    pace, idle = 1.0, 0
    for step in range(1, steps + 1):
        if not found.value <= goal:
            return found, None, step
        way = way_of(limits, found)
        slope = visits(way, len(price)) - many
        if (slope <= 0).all():
            cost = found.value + float(price @ (many - visits(way, len(price))))
            if cost <= goal:
                return found, way, step
        slope[(slope < 0) & (price <= 0)] = 0.0
        norm = float(slope @ slope)
        if norm == 0:
            return found, None, step
        if found.value > kept.value:
            kept, idle = found, 0
        else:
            idle += 1
            if idle == PATIENCE:
                pace, idle, price = pace / 2, 0, kept.price
                if pace < LEAST_PACE:
                    break
        aim = goal + 0.02 * abs(goal) + 1e-12
        price = np.maximum(0.0, price + pace * (aim - found.value) / norm * slope)
        found = relaxed(limits, price)
    return (found if found.value > kept.value else kept), None, steps
