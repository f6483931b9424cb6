"""Hops over relays: how short they become, and which layers each relay is given in the end."""

from __future__ import annotations

import numpy as np

from peerllm.planner.arrays import Flags, Floats, Ints
from peerllm.planner.latency.assignment_problem import AssignmentProblem, DeviceRoute
from peerllm.planner.latency.mixed_layers.layer_runs import LayerRuns
from peerllm.planner.latency.relay_path import cheapest_relays


def relayed_hops(
    problem: AssignmentProblem, runs: LayerRuns, i: int, device: Ints, available: Flags
) -> tuple[Floats, int]:
    """[labels, devices]: the cheapest hop from layer i on `device` [labels] over `available` relays [labels, devices].

    After the last layer of a run, the target may be a relay too. Also returns the work: array elements touched.
    """
    onward = problem.hop[i]
    hop: Floats = onward[device]
    hop[np.arange(len(device)), device] = np.inf
    relays = np.flatnonzero(runs.relay[i] & available.any(axis=0))
    if not len(relays):
        return hop, hop.size
    inner = problem.hop[runs.first[i]]
    closed = np.where(available[:, relays], 0.0, np.inf)
    there = inner[device[:, None], relays] + closed
    there[device[:, None] == relays] = np.inf
    rounds = 0
    for _ in relays[1:]:
        before = there.copy()
        for place, k in enumerate(relays):
            np.minimum(there, before[:, place, None] + inner[k, relays] + closed, out=there)
        rounds += 1
        if (there == before).all():
            break
    for place, k in enumerate(relays):
        np.minimum(hop, there[:, place, None] + onward[k], out=hop)
    return hop, hop.size * (1 + len(relays)) * (1 + rounds)


def placement_over_relays(problem: AssignmentProblem, runs: LayerRuns, route: DeviceRoute) -> tuple[int, ...]:
    """A device for every layer, over relays where they are shorter and have a layer to take."""
    placement: list[int] = []
    parts: list[list[int]] = []  # visits in the current run: device, layers, layers it can give away (first visit only)

    def close() -> None:
        for device, layers, _ in parts:
            placement.extend([device] * layers)
        parts.clear()

    def relay(i: int, here: int, to: int) -> None:
        can_relay = {part[0]: part for part in parts if part[2] > 0 and runs.relay[i, part[0]]}
        for k in cheapest_relays(problem.hop[runs.first[i]], here, list(can_relay), problem.hop[i][:, to]):
            can_relay[k][1] -= 1
            can_relay[k][2] -= 1
            parts.append([k, 1, 0])

    start, here = 0, -1
    for device, end in route:
        if start:
            relay(start - 1, here, device)
            if runs.first[start] == start:
                close()
        while start <= end:
            stop = min(end, int(runs.last[start]))
            again = any(part[0] == device for part in parts)
            parts.append([device, stop + 1 - start, 0 if again else stop - start])
            if stop < end:
                close()
            start = stop + 1
        here = device
    close()
    return tuple(placement)
