"""EdgeShard's algorithms as published (arXiv 2405.14371), for comparison: their plans need not be the best.

Costs, KV memory and the place of the first two layers are those of our objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf, isfinite, prod

import numpy as np

from peerllm.errors import InfeasibleError
from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, Links, hop_ms, layer_bytes, layer_ms, stages_of
from peerllm.planner.latency.latency_plan import assignment_problem
from peerllm.planner.routing.device_classes import device_classes
from peerllm.planner.scenario.json_value import ScenarioError
from peerllm.types import DeviceId, DeviceProfile, ModelProfile, Stage, Workload

MAX_STATES = 20_000_000  # (devices used, last of them, layers placed): 160 MB of numbers
CHUNK = 1024  # states extended at once: they fit the processor's cache


def latency(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    source: DeviceId,
    workload: Workload,
) -> tuple[Stage, ...]:
    """DP(i,j) = min over k of DP(i-1,k) + t_comp(i,j) + t_comm(i-1,k,j); a state keeps its winner's memory only."""
    order = tuple(dict.fromkeys((source, *devices)))
    problem = assignment_problem(model, devices, links, order, workload=workload, working={}, head_on_source=False)
    layers, count = problem.cost.shape
    every = np.arange(count)
    value = np.full(count, inf)
    left = np.tile(problem.room, (count, 1))  # [state's device, device]: bytes not yet used
    left[0, 0] -= problem.memory[0, 0]
    if left[0, 0] >= 0:
        value[0] = problem.cost[0, 0]
    trail: list[Ints] = []
    for i in range(1, layers):
        reached = value[:, None] + problem.cost[i] + problem.hop[i - 1]
        reached[left < problem.memory[i]] = inf
        winner = reached.argmin(axis=0)
        value, left = reached[winner, every], left[winner]
        left[every, every] -= problem.memory[i]
        if not np.isfinite(value).any():
            raise _stuck(model, i)
        trail.append(winner)
    value += problem.back
    home = int(value.argmin())
    if not isfinite(value[home]):
        raise InfeasibleError("the published algorithm finds no way whose last device has a link back to the source")
    placement = [home]
    for winner in reversed(trail):
        placement.append(int(winner[placement[-1]]))
    return stages_of([order[place] for place in reversed(placement)])


def throughput(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    source: DeviceId,
    workload: Workload,
) -> tuple[Stage, ...]:
    """g(m, S∪{j}, j) = min over i<m, j∉S of max{g(i,S,k), t_comm(i-1,k,j), t_comp(i→m,j)}: one sequence, no return hop.

    The source comes first, with any number of layers. States count the used devices of each class of interchangeable
    ones. ScenarioError if there would be more than MAX_STATES.
    """
    order = tuple(dict.fromkeys((source, *devices)))
    room = {device: devices[device].memory_bytes for device in order}
    (_, *kinds) = device_classes(devices, links, order, room)
    layers, many = len(model.layers), [len(kind) for kind in kinds]
    subsets = prod(count + 1 for count in many)
    if subsets * len(kinds) * (layers + 1) > MAX_STATES:
        raise ScenarioError(f"devices make {subsets} subsets: edgeshard-paper looks at every one, edgeshard need not")
    start = _runs(model, devices[source], workload, source=True)[0]
    start[:SOURCE_LAYERS] = inf
    runs = [_runs(model, devices[kind[0]], workload) for kind in kinds]
    begun = [np.maximum(start, _hops(model, links, source, kind[0])) for kind in kinds]
    hops = np.array([[_hops(model, links, a[0], b[-1]) for a in kinds] for b in kinds])  # [to, from, layers + 1]
    steps = list(accumulate(many, lambda step, count: step * (count + 1), initial=1))[:-1]
    codes = np.arange(subsets)
    used = np.array([codes // step % (count + 1) for step, count in zip(steps, many, strict=True)]).reshape(-1, subsets)
    size = used.sum(axis=0)
    table = np.full((subsets, len(kinds), layers + 1), inf)
    for total in range(1, min(sum(many), layers - SOURCE_LAYERS) + 1):
        for j, step in enumerate(steps):
            into = np.flatnonzero((size == total) & (used[j] > 0))
            for some in np.array_split(into, -(-len(into) // CHUNK) or 1):
                before = begun[j][None] if total == 1 else np.maximum(table[some - step], hops[j]).min(axis=1)
                table[some, j] = _extended(before, runs[j])
    last = table[:, :, layers].min(axis=1, initial=inf)
    best = min(float(last.min()), float(start[layers]))
    if not isfinite(best):
        placed = np.isfinite(table).any(axis=(0, 1)) | np.isfinite(start)
        raise _stuck(model, int(np.flatnonzero(placed).max(initial=0)))
    cuts: list[tuple[int, int]] = []  # (kind, first layer), the last stage first
    m, code = layers, int(np.where(last == best, size, subsets).argmin()) if start[layers] > best else 0
    j = int(table[code, :, m].argmin()) if code else 0
    while code:
        before = begun[j] if size[code] == 1 else np.maximum(table[code - steps[j]], hops[j]).min(axis=0)
        m = int(np.maximum(before, runs[j][:, m]).argmin())
        cuts.append((j, m))
        code -= steps[j]
        j = int(np.maximum(table[code, :, m], hops[j][:, m]).argmin())
    return _stages(source, kinds, cuts, layers)


def _stages(
    source: DeviceId, kinds: Sequence[Sequence[DeviceId]], cuts: Sequence[tuple[int, int]], layers: int
) -> tuple[Stage, ...]:
    """The source's stage, then a device of each class; `cuts` runs backwards."""
    fresh = [iter(kind) for kind in kinds]
    starts = [(source, 0), *((next(fresh[kind]), first) for kind, first in reversed(cuts))]
    ends = [*(first for _, first in starts[1:]), layers]
    return tuple(Stage(device, first, end - 1) for (device, first), end in zip(starts, ends, strict=True))


def _runs(model: ModelProfile, device: DeviceProfile, workload: Workload, source: bool = False) -> Floats:
    """[i, m]: compute of layers i..m-1 for one token on one device; infinite where they do not fit."""
    layers = len(model.layers)
    each = np.array([layer_ms(device, layer, 1) for layer in model.layers])
    unknown = np.cumsum([0, *~np.isfinite(each)])  # layers of kinds that were never measured here
    ms = np.cumsum([0.0, *np.where(np.isfinite(each), each, 0.0)])
    sizes = np.cumsum([0, *(layer_bytes(model, index, workload, beside=source) for index in range(layers))])
    runs: Floats = ms[None, :] - ms[:, None]
    runs[(sizes[None, :] - sizes[:, None] > device.memory_bytes) | (unknown[None, :] > unknown[:, None])] = inf
    runs[np.tril_indices(layers + 1)] = inf
    return runs


def _hops(model: ModelProfile, links: Links, sender: DeviceId, receiver: DeviceId) -> Floats:
    """[i]: the hop of one token between layers i-1 and i; infinite before layer 0 and after the last."""
    inner = (hop_ms(links, sender, receiver, layer.output_bytes_per_token) for layer in model.layers[:-1])
    return np.array([inf, *inner, inf])


def _extended(before: Floats, runs: Floats) -> Floats:
    """[state, m]: min over i of max(before[state, i], runs[i, m])."""
    found = np.full(before.shape, inf)
    for i in range(SOURCE_LAYERS, before.shape[1] - 1):
        later = found[:, i + 1 :]
        np.minimum(later, np.maximum(before[:, i, None], runs[i, i + 1 :]), out=later)
    return found


def _stuck(model: ModelProfile, index: int) -> InfeasibleError:
    name = model.layers[index].name
    return InfeasibleError(f"layer {index} ({name}) of {model.name} fits nowhere in what the published algorithm keeps")
