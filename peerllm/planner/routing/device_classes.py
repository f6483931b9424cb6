"""Classes of interchangeable devices: fifteen boards of two kinds cost the search as much as two devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peerllm.planner.arrays import Ints
from peerllm.planner.cost.layer_costs import Links
from peerllm.types import DeviceId, DeviceProfile


def device_classes(
    devices: Mapping[DeviceId, DeviceProfile], links: Links, order: Sequence[DeviceId], room: Mapping[DeviceId, int]
) -> list[list[DeviceId]]:
    """Group `order` into classes whose members may be swapped without changing any cost.

    The first device, the source, stays alone.
    """
    kinds: dict[object, int] = {}

    def kind(device: DeviceId) -> int:
        speed = tuple(sorted((name, tuple(points)) for name, points in devices[device].layer_ms.items()))
        return kinds.setdefault((speed, room[device]), len(kinds))

    profile = [kind(device) for device in order]
    table = _link_table(links, order)
    found: list[list[int]] = [[0]]
    for j in range(1, len(order)):
        for group in found[1:]:
            if profile[group[0]] == profile[j] and _interchangeable(table, group[0], j):
                group.append(j)
                break
        else:
            found.append([j])
    return [[order[j] for j in group] for group in found]


def _link_table(links: Links, order: Sequence[DeviceId]) -> Ints:
    """[from, to]: the same number for equal links, -1 where there is no link."""
    numbers: dict[tuple[float, float], int] = {}
    place = {device: j for j, device in enumerate(order)}
    table = np.full((len(order), len(order)), -1, dtype=np.int64)
    for (a, b), link in links.items():
        if a in place and b in place:
            table[place[a], place[b]] = numbers.setdefault((link.latency_ms, link.mbps), len(numbers))
    np.fill_diagonal(table, -2)
    return table


def _interchangeable(table: Ints, j: int, k: int) -> bool:
    others = np.ones(len(table), dtype=bool)
    others[[j, k]] = False
    same = np.array_equal(table[j, others], table[k, others]) and np.array_equal(table[others, j], table[others, k])
    return bool(same and table[j, k] == table[k, j])
