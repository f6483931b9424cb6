"""The cost model's basis: what a layer, a hop and a stage cost in milliseconds and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf

from peerllm.types import (
    DeviceId,
    DeviceProfile,
    Layer,
    LinkProfile,
    ModelProfile,
    Stage,
    Workload,
)

Links = Mapping[tuple[DeviceId, DeviceId], LinkProfile]  # (sender, receiver); a missing pair has no link
SOURCE_LAYERS = 2  # the embedding and the first block stay on the source: nobody else sees token ids


def batch_ms(points: Sequence[tuple[int, float]], tokens: int) -> float:
    """Time of one layer for `tokens`: constant below the first point, linear between, proportional beyond the last."""
    if not points:
        return inf
    if tokens <= points[0][0] or len(points) == 1:
        return points[0][1]
    for (low, low_ms), (high, high_ms) in pairwise(points):
        if tokens <= high:
            return low_ms + (high_ms - low_ms) * (tokens - low) / (high - low)
    last, last_ms = points[-1]
    return last_ms * tokens / last


def layer_ms(device: DeviceProfile, layer: Layer, tokens: int) -> float:
    """Time of one layer for `tokens`; infinite if the device was never measured for this kind of layer."""
    return batch_ms(device.layer_ms.get(layer.kind, ()), tokens)


def hop_ms(links: Links, sender: DeviceId, receiver: DeviceId, nbytes: float) -> float:
    """Time of a transfer: zero within a device, infinite without a link."""
    if sender == receiver:
        return 0.0
    link = links.get((sender, receiver))
    return inf if link is None else link.latency_ms + nbytes * 8 / (link.mbps * 1000)


def tokens_entering(model: ModelProfile, index: int, batches: Sequence[int]) -> Sequence[int]:
    """The batches of one sequence that enter layer `index`; the head and the way home see one token only."""
    return (1,) if index >= len(model.layers) - 1 else batches


def kv_bytes(layer: Layer, sequences: int, context: int) -> int:
    """Room for `sequences` × `context` tokens; a window keeps the window, a recurrent layer its state."""
    kept = context if layer.kv_window_tokens is None else min(context, layer.kv_window_tokens)
    return sequences * (kept * layer.kv_bytes_per_token + layer.state_bytes_per_sequence)


def layer_bytes(model: ModelProfile, index: int, workload: Workload, beside: bool = False) -> int:
    """Weights and KV of one layer; `beside`: on the same device as the layer whose weights it shares."""
    layer = model.layers[index]
    shared = beside and layer.tied_to is not None
    return (0 if shared else layer.memory_bytes) + kv_bytes(layer, workload.sequences, workload.context)


def stage_bytes(model: ModelProfile, stages: Sequence[Stage], workload: Workload) -> tuple[int, ...]:
    """Weights and KV of each stage; shared weights count once per device."""
    home = {index: stage.device for stage in stages for index in range(stage.first_layer, stage.last_layer + 1)}

    def one(index: int) -> int:
        shared_with = model.layers[index].tied_to
        return layer_bytes(model, index, workload, shared_with is not None and home[shared_with] == home[index])

    return tuple(sum(one(index) for index in range(s.first_layer, s.last_layer + 1)) for s in stages)


def pass_ms(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    stages: Sequence[Stage],
    batches: Sequence[int],
) -> float:
    """One sequence's tokens, in `batches`, through every stage and back to the source, nothing overlapping."""
    total = 0.0
    for place, stage in enumerate(stages):
        device = devices[stage.device]
        for index in range(stage.first_layer, stage.last_layer + 1):
            total += sum(layer_ms(device, model.layers[index], n) for n in tokens_entering(model, index, batches))
        last = stage.last_layer
        after = stages[(place + 1) % len(stages)].device  # the last stage sends to the source
        each = model.layers[last].output_bytes_per_token
        total += sum(hop_ms(links, stage.device, after, n * each) for n in tokens_entering(model, last + 1, batches))
    return total


def stages_of(placement: Sequence[DeviceId]) -> tuple[Stage, ...]:
    """The stages of a placement (a device for each layer): consecutive layers on one device become one stage."""
    stages: list[Stage] = []
    for index, device in enumerate(placement):
        if stages and stages[-1].device == device:
            stages[-1] = Stage(device, stages[-1].first_layer, index)
        else:
            stages.append(Stage(device, index, index))
    return tuple(stages)
