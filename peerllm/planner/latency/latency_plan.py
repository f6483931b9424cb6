"""EdgeShard's latency plan (eq. 3-5) with the return hop, KV memory and prompts: the least time for one request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np

from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.cost.infeasibility import explain_infeasible
from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, Links, layer_bytes, layer_ms, stages_of, tokens_entering
from peerllm.planner.cost.prediction import predict_latency
from peerllm.planner.latency.assignment_problem import AssignmentProblem
from peerllm.planner.latency.assignment_search import cheapest_assignment
from peerllm.types import DeviceId, DeviceProfile, Layer, ModelProfile, Plan, Workload

MAX_FILLINGS = 4096  # combinations of rare layer sizes tried per device


def plan_latency(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    source: DeviceId,
    workload: Workload,
    *,
    working_bytes: Mapping[DeviceId, int] | int = 0,
    head_on_source: bool = False,
    extra_ms: Mapping[tuple[int, DeviceId], float] | None = None,
) -> Plan:
    """Minimise time to first token + (output_tokens - 1) · step, both sequential and ending at the source.

    `working_bytes` are set aside once on every device used. `extra_ms` (not negative; missing: 0) is added where a
    layer lies on a device: the sum is minimised, `optimal` and `bound` are about the sum, but `predicted` is the
    request's. InfeasibleError names the bytes missing in total, or the layer that fits nowhere.
    """
    order = (source, *sorted(device for device in devices if device != source))
    working = working_bytes if isinstance(working_bytes, Mapping) else dict.fromkeys(order, working_bytes)
    problem = assignment_problem(
        model, devices, links, order, workload=workload, working=working, head_on_source=head_on_source
    )
    extra = _extra(extra_ms or {}, len(model.layers), order)
    problem = replace(problem, cost=problem.cost + extra)
    found = cheapest_assignment(replace(problem, room=_fillable_memory(problem)))
    if not found.placement:
        raise explain_infeasible(
            model,
            devices,
            source,
            workload,
            working,
            head_on_source=head_on_source,
            reached=found.reached,
            proven=found.proven,
        )
    stages = stages_of([order[home] for home in found.placement])
    predicted = predict_latency(model, devices, links, stages, workload)
    value = predicted.request_ms + sum(float(extra[i, home]) for i, home in enumerate(found.placement))
    bound = value if found.proven else min(found.bound, value)
    return Plan(stages, predicted, optimal=found.proven, bound=bound)


def assignment_problem(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    order: tuple[DeviceId, ...],
    *,
    workload: Workload,
    working: Mapping[DeviceId, int],
    head_on_source: bool = False,
) -> AssignmentProblem:
    """The latency objective as arrays; `order` lists the devices, the source first."""
    layers, count = len(model.layers), len(order)
    steps = workload.output_tokens - 1
    cost = np.empty((layers, count))
    memory = np.empty((layers, count), dtype=np.int64)
    hops = np.empty((layers, count, count))
    latency, ms_per_byte = _links(links, order)
    times: dict[tuple[str, bool], Floats] = {}
    for i, layer in enumerate(model.layers):
        prompt = tokens_entering(model, i, workload.pieces)
        key = (layer.kind, i == layers - 1)
        if key not in times:
            times[key] = np.array([_request_ms(devices[device], layer, prompt, steps) for device in order])
        cost[i] = times[key]
        memory[i] = layer_bytes(model, i, workload)
        if layer.tied_to is not None and layer.tied_to < SOURCE_LAYERS:
            memory[i, 0] = layer_bytes(model, i, workload, True)
        if i < SOURCE_LAYERS or (head_on_source and i == layers - 1):
            cost[i, 1:] = np.inf
        onward = tokens_entering(model, i + 1, workload.pieces)
        hops[i] = (len(onward) + steps) * latency + (sum(onward) + steps) * layer.output_bytes_per_token * ms_per_byte
        np.fill_diagonal(hops[i], 0.0)
    room = np.array([max(devices[d].memory_bytes - working.get(d, 0), -1) for d in order], dtype=np.int64)
    cost[:, room < 0] = np.inf
    return AssignmentProblem(cost, hops, hops[-1][:, 0].copy(), memory, room)


def _request_ms(device: DeviceProfile, layer: Layer, prompt: Sequence[int], steps: int) -> float:
    """One layer's time for a whole request: prompt and decode steps."""
    first = sum(layer_ms(device, layer, n) for n in prompt)
    return first + (steps * layer_ms(device, layer, 1) if steps else 0.0)


def _links(links: Links, order: tuple[DeviceId, ...]) -> tuple[Floats, Floats]:
    """[from, to]: milliseconds per hop and per byte; infinite where there is no link."""
    place = {device: j for j, device in enumerate(order)}
    latency = np.full((len(order), len(order)), np.inf)
    ms_per_byte = np.zeros_like(latency)
    for (a, b), link in links.items():
        if a in place and b in place:
            latency[place[a], place[b]] = link.latency_ms
            ms_per_byte[place[a], place[b]] = 8 / (link.mbps * 1000)
    return latency, ms_per_byte


def _extra(extra_ms: Mapping[tuple[int, DeviceId], float], layers: int, order: tuple[DeviceId, ...]) -> Floats:
    place = {device: j for j, device in enumerate(order)}
    extra = np.zeros((layers, len(order)))
    for (layer, device), ms in extra_ms.items():
        if ms < 0:
            raise ValueError(f"layer {layer} may not cost {ms} ms less on {device}")
        extra[layer, place[device]] = ms
    return extra


def _fillable_memory(problem: AssignmentProblem) -> Ints:
    """Each device's room, rounded down to what some choice of layers fills: the rest would only loosen the bound."""
    rooms = []
    for j, room in enumerate(problem.room):
        usable = np.isfinite(problem.cost[:, j]) & (problem.memory[:, j] > 0)
        rooms.append(most_fillable(Counter(problem.memory[usable, j].tolist()), int(room)))
    return np.array(rooms, dtype=np.int64)


def most_fillable(sizes: Mapping[int, int], room: int) -> int:
    """The most bytes of `room` that layers can fill (size: count); `room` itself where counting takes too long."""
    common, *others = sorted(sizes, key=lambda size: -sizes[size]) or [0]
    if not common or prod(sizes[size] + 1 for size in others) > MAX_FILLINGS:
        return room
    best = min(room, 0)
    for counts in product(*(range(sizes[size] + 1) for size in others)):
        left = room - sum(size * n for size, n in zip(others, counts, strict=True))
        if left >= 0:
            best = max(best, room - left + min(left // common, sizes[common]) * common)
    return best
