"""Both objectives as the scenario file's page states them, over every assignment: what the planner must agree with.

Of the planner only `batch_ms` and `hop_ms` are used. An assignment is a device per layer; `order` lists the devices,
the source first. `request_ms`, `rate` and `fits` say it plainly of one assignment; the rest says it of all at once.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby, pairwise, product
from math import inf

import numpy as np

from peerllm.planner.cost.layer_costs import batch_ms, hop_ms


def time_of(device, layer, tokens):
    return batch_ms(device.layer_ms.get(layer.kind, ()), tokens)


def room_of(layer, workload):
    kept = min(workload.context, layer.kv_window_tokens or workload.context)
    return workload.sequences * (kept * layer.kv_bytes_per_token + layer.state_bytes_per_sequence)


def prompt_of(workload):
    """The prompt's tokens as they travel."""
    left, pieces = workload.prompt_tokens, []
    while left > 0:
        pieces.append(min(left, workload.prompt_chunk or left))
        left -= pieces[-1]
    return pieces


def pass_ms(model, devices, links, homes, body, last):
    """One way through and back; `body` are the batches that travel up to the last block, `last` the ones beyond it."""
    total, count = 0.0, len(homes)
    for i, home in enumerate(homes):
        total += sum(time_of(devices[home], model.layers[i], n) for n in (last if i == count - 1 else body))
        after, each = homes[(i + 1) % count], model.layers[i].output_bytes_per_token
        total += sum(hop_ms(links, home, after, n * each) for n in (last if i >= count - 2 else body))
    return total


def request_ms(model, devices, links, homes, workload):
    first = pass_ms(model, devices, links, homes, prompt_of(workload), [1])
    step = pass_ms(model, devices, links, homes, [1], [1])
    return inf if inf in (first, step) else first + (workload.output_tokens - 1) * step


def rate(model, devices, links, homes, b, m, media=()):
    """Tokens per millisecond of m micro-batches of b sequences, one token each."""
    computes = dict.fromkeys(homes, 0.0)
    for home, layer in zip(homes, model.layers, strict=True):
        computes[home] += time_of(devices[home], layer, b)
    hops = [
        ((home, after), b * layer.output_bytes_per_token)
        for layer, (home, after) in zip(model.layers, pairwise((*homes, homes[0])), strict=True)
        if home != after
    ]
    waits = dict.fromkeys((pair for pair, _ in hops), 0.0)  # a lap may take a link twice
    for (a, z), nbytes in hops:
        waits[a, z] += hop_ms(links, a, z, nbytes)
    if inf in waits.values():
        return 0.0
    airtimes = [
        sum(nbytes * 8 / (links[pair].mbps * 1000) for pair, nbytes in hops if pair in medium.links) for medium in media
    ]
    bottleneck, ring = (
        max(*computes.values(), *waits.values(), *airtimes, 0.0),
        sum(computes.values()) + sum(waits.values()),
    )
    return b * min(1 / bottleneck, m / ring) if ring else inf


def fits(model, devices, homes, workload, working):
    used = dict.fromkeys(homes, 0)
    for home, layer in zip(homes, model.layers, strict=True):
        shared = layer.tied_to is not None and homes[layer.tied_to] == home
        used[home] += (0 if shared else layer.memory_bytes) + room_of(layer, workload)
    return all(nbytes + working.get(home, 0) <= devices[home].memory_bytes for home, nbytes in used.items())


def homes_of(plan):
    """A plan's assignment."""
    return tuple(stage.device for stage in plan.stages for _ in range(stage.first_layer, stage.last_layer + 1))


def divides(homes):
    """One contiguous range per device, except that the source (the first) may also hold the head."""
    body = homes[:-1] if homes[-1] == homes[0] else homes
    runs = [home for home, _ in groupby(body)]
    return len(runs) == len(set(runs))


@lru_cache
def assignments(layers, count):
    """[assignment, layer]: every device for every layer, but layers 0 and 1 on device 0."""
    return np.array([(0, 0, *rest) for rest in product(range(count), repeat=layers - 2)])


@lru_cache
def divisions(layers, count):
    """Those of `assignments` that cut the model into one range per device."""
    return np.array([homes for homes in assignments(layers, count) if divides(homes.tolist())])


def roomy(model, devices, order, workload, working, homes):
    """[assignment]: whether it fits."""
    good = np.ones(len(homes), dtype=bool)
    for j, name in enumerate(order):
        here, used = homes == j, np.zeros(len(homes), dtype=np.int64)
        for i, layer in enumerate(model.layers):
            shared = here[:, i] & here[:, layer.tied_to] if layer.tied_to is not None else False
            used += here[:, i] * (layer.memory_bytes + room_of(layer, workload)) - shared * layer.memory_bytes
        good &= ~here.any(axis=1) | (used + working.get(name, 0) <= devices[name].memory_bytes)
    return good


def computes(model, devices, order, homes, body, last):
    """[assignment, layer] in ms."""
    times = np.empty((len(model.layers), len(order)))
    for i, layer in enumerate(model.layers):
        batches = last if i == len(model.layers) - 1 else body
        times[i] = [sum(time_of(devices[name], layer, n) for n in batches) for name in order]
    return times[np.arange(len(times)), homes]


def hops(model, order, homes, body, last, ms):
    """[assignment, layer]: what `ms(sender, receiver, bytes)` says of the way from each layer to the next, and back."""
    count = len(model.layers)
    times = np.zeros((count, len(order), len(order)))
    for i, layer in enumerate(model.layers):
        batches, each = (last if i >= count - 2 else body), layer.output_bytes_per_token
        times[i] = [[sum(ms(a, z, n * each) for n in batches) for z in order] for a in order]
    return times[np.arange(count), homes, np.roll(homes, -1, axis=1)]


def requests_ms(model, devices, links, order, workload, homes):
    """[assignment]: request_ms of each."""

    def once(body):
        computed = computes(model, devices, order, homes, body, [1]).sum(axis=1)
        return computed + hops(model, order, homes, body, [1], lambda a, z, n: hop_ms(links, a, z, n)).sum(axis=1)

    first, steps = once(prompt_of(workload)), workload.output_tokens - 1
    return first + steps * once([1]) if steps else first


def rates(model, devices, links, order, homes, b, m, media=()):
    """[assignment]: tokens per millisecond of each; 0 where a link is missing."""

    def air(medium):
        def ms(a, z, nbytes):
            return nbytes * 8 / (links[a, z].mbps * 1000) if (a, z) in medium.links and (a, z) in links else 0.0

        return hops(model, order, homes, [b], [b], ms).sum(axis=1)

    compute = computes(model, devices, order, homes, [b], [b])
    hop = hops(model, order, homes, [b], [b], lambda a, z, n: hop_ms(links, a, z, n))
    ring = compute.sum(axis=1) + hop.sum(axis=1)
    slow = hop.max(axis=1)
    for j in range(len(order)):
        slow = np.maximum(slow, np.where(homes == j, compute, 0.0).sum(axis=1))
    for medium in media:
        slow = np.maximum(slow, air(medium))
    with np.errstate(divide="ignore"):
        return np.where(np.isfinite(ring), b * np.minimum(1 / slow, m / ring), 0.0)


def ways(model, devices, source, workload, working, head_on_source, every):
    """The devices, source first, and those of `every` assignment that fit."""
    order = (source, *sorted(set(devices) - {source}))
    homes = every(len(model.layers), len(order))
    homes = homes[homes[:, -1] == 0] if head_on_source else homes
    return order, homes[roomy(model, devices, order, workload, working, homes)]


def least_request_ms(model, devices, links, source, workload, *, working, head_on_source=False):
    """The latency optimum, or infinity."""
    order, homes = ways(model, devices, source, workload, working, head_on_source, assignments)
    return min(requests_ms(model, devices, links, order, workload, homes), default=inf)


def most_tokens_per_second(model, devices, links, source, workload, *, working, head_on_source=False, media=()):
    """The throughput optimum over divisions, b and m, or 0."""
    order, homes = ways(model, devices, source, workload, working, head_on_source, divisions)
    best = 0.0
    for b in range(1, workload.sequences + 1):
        # the rate never falls as m grows, but that too is only tried
        for m in range(1, workload.sequences // b + 1):
            best = max(best, *rates(model, devices, links, order, homes, b, m, media), 0.0)
    return 1000 * best
