"""The one cost model (design §6): what a layer, a hop, a stage and a whole plan cost in milliseconds and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf

from peerllm.errors import InfeasibleError
from peerllm.types import DeviceId, DeviceProfile, Layer, LinkProfile, ModelProfile, Prediction, Stage, Workload

Links = Mapping[tuple[DeviceId, DeviceId], LinkProfile]  # ordered pairs; a missing one means no link
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
    """Infinite where the device was never measured for this kind of layer."""
    return batch_ms(device.layer_ms.get(layer.kind, ()), tokens)


def hop_ms(links: Links, sender: DeviceId, receiver: DeviceId, nbytes: float) -> float:
    """Zero within a device, infinite without a link."""
    if sender == receiver:
        return 0.0
    link = links.get((sender, receiver))
    return inf if link is None else link.latency_ms + nbytes * 8 / (link.mbps * 1000)


def tokens_in(model: ModelProfile, index: int, tokens: int) -> int:
    """How many of a batch's tokens enter layer `index`: the head picks one token however long the prompt."""
    return 1 if index == len(model.layers) - 1 else tokens


def kv_bytes(layer: Layer, sequences: int, context: int) -> int:
    """Room for `sequences` × `context` tokens; a window keeps the window, a recurrent layer its state."""
    kept = context if layer.kv_window_tokens is None else min(context, layer.kv_window_tokens)
    return sequences * (kept * layer.kv_bytes_per_token + layer.state_bytes_per_sequence)


def layer_bytes(model: ModelProfile, index: int, workload: Workload, beside: bool = False) -> int:
    """Weights and KV of one layer; `beside` says that the layer it is tied to lies on the same device."""
    layer = model.layers[index]
    shared = beside and layer.tied_to is not None
    return (0 if shared else layer.memory_bytes) + kv_bytes(layer, workload.sequences, workload.context)


def stage_bytes(model: ModelProfile, stages: Sequence[Stage], workload: Workload) -> tuple[int, ...]:
    """Weights and KV of each stage; a tied layer is free where its twin lies on the same device."""
    home = {index: stage.device for stage in stages for index in range(stage.first_layer, stage.last_layer + 1)}

    def one(index: int) -> int:
        twin = model.layers[index].tied_to
        return layer_bytes(model, index, workload, twin is not None and home[twin] == home[index])

    return tuple(sum(one(index) for index in range(s.first_layer, s.last_layer + 1)) for s in stages)


def pass_ms(
    model: ModelProfile, devices: Mapping[DeviceId, DeviceProfile], links: Links, stages: Sequence[Stage], tokens: int
) -> float:
    """One sequence's way through every stage and back to the source with `tokens` at once, nothing overlapping."""
    total = 0.0
    for place, stage in enumerate(stages):
        device = devices[stage.device]
        for index in range(stage.first_layer, stage.last_layer + 1):
            total += layer_ms(device, model.layers[index], tokens_in(model, index, tokens))
        last = stage.last_layer
        after = stages[(place + 1) % len(stages)].device  # the way back to the source closes the ring
        sent = 1 if last == len(model.layers) - 1 else tokens_in(model, last + 1, tokens)
        total += hop_ms(links, stage.device, after, sent * model.layers[last].output_bytes_per_token)
    return total


def predict(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    stages: Sequence[Stage],
    workload: Workload,
) -> Prediction:
    """The latency figures of a plan; InfeasibleError if it uses a link that is not there."""
    first = pass_ms(model, devices, links, stages, workload.prompt_tokens)
    step = pass_ms(model, devices, links, stages, 1)
    if inf in (first, step):
        raise InfeasibleError("the plan crosses a link that is not there, or a device that was never measured")
    request = first + (workload.output_tokens - 1) * step
    share: dict[DeviceId, float] = {}
    for stage in stages:
        used = model.layers[stage.first_layer : stage.last_layer + 1]
        share[stage.device] = share.get(stage.device, 0.0) + sum(layer_ms(devices[stage.device], x, 1) for x in used)
    slowest = max(share, key=lambda device: share[device])
    return Prediction(
        time_to_first_token_ms=first,
        step_ms=step,
        request_ms=request,
        tokens_per_second=1000 * workload.output_tokens / request if request else 0.0,
        bottleneck=devices[slowest].name,
    )


def merged(homes: Sequence[DeviceId]) -> tuple[Stage, ...]:
    """One device per layer, as stages: neighbours on one device become one."""
    stages: list[Stage] = []
    for index, device in enumerate(homes):
        if stages and stages[-1].device == device:
            stages[-1] = Stage(device, stages[-1].first_layer, index)
        else:
            stages.append(Stage(device, index, index))
    return tuple(stages)
