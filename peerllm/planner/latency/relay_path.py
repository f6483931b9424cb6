"""The cheapest path from one device to the next through devices that are already on the route."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peerllm.planner.arrays import Floats


def cheapest_relays(hop: Floats, start: int, relays: list[int], onward: Floats) -> list[int]:
    """The relays on the cheapest path from `start`; `onward` is what the final hop costs from each device."""
    cost: dict[int, float] = {start: 0.0}
    before: dict[int, int] = {}
    for _ in relays:
        for here, kind in [(here, kind) for here in list(cost) for kind in relays if kind != start]:
            through = cost[here] + float(hop[here, kind])
            if through < cost.get(kind, np.inf):
                cost[kind], before[kind] = through, here
    last = min(cost, key=_total(cost, onward))
    found: list[int] = []
    while last != start:
        found.append(last)
        last = before[last]
    return found[::-1]


def _total(cost: dict[int, float], onward: Floats) -> Callable[[int], float]:
    return lambda kind: cost[kind] + float(onward[kind])
