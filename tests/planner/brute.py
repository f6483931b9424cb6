"""The plain definition of the latency objective, over every assignment: what the planner must agree with."""

from __future__ import annotations

from itertools import product
from math import inf

from peerllm.planner.cost import hop_ms, layer_ms
from peerllm.types import DeviceId


def request_ms(model, devices, links, homes, workload):
    def once(tokens):
        total = 0.0
        for i, home in enumerate(homes):
            layer = model.layers[i]
            head = i == len(homes) - 1
            total += layer_ms(devices[home], layer, 1 if head else tokens)
            after = homes[0] if head else homes[i + 1]
            sent = 1 if i >= len(homes) - 2 else tokens
            total += hop_ms(links, home, after, sent * layer.output_bytes_per_token)
        return total

    first, step = once(workload.prompt_tokens), once(1)
    return inf if inf in (first, step) else first + (workload.output_tokens - 1) * step


def fits(model, devices, homes, workload, working):
    used: dict[DeviceId, int] = {}
    for i, home in enumerate(homes):
        layer = model.layers[i]
        shared = layer.tied_to is not None and homes[layer.tied_to] == home
        kept = min(workload.context, layer.kv_window_tokens or workload.context)
        used[home] = used.get(home, working) + (0 if shared else layer.memory_bytes)
        used[home] += workload.sequences * (kept * layer.kv_bytes_per_token + layer.state_bytes_per_sequence)
    return all(nbytes <= devices[home].memory_bytes for home, nbytes in used.items())


def best(model, devices, links, source, workload, working=0, head_on_source=False):
    """(milliseconds, assignment) of the optimum, or (inf, None)."""
    found = (inf, None)
    count = len(model.layers)
    for rest in product(sorted(devices), repeat=count - 2):
        homes = (source, source, *rest)
        if head_on_source and homes[-1] != source:
            continue
        if fits(model, devices, homes, workload, working):
            cost = request_ms(model, devices, links, homes, workload)
            if cost < found[0]:
                found = (cost, homes)
    return found
