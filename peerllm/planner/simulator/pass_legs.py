"""What a pass takes at each stage, from the cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.layer_costs import Links, hop_ms, layer_ms
from peerllm.types import DeviceId, DeviceProfile, ModelProfile, Stage


@dataclass(frozen=True, slots=True)
class Leg:
    """One stage's work in a pass, and the hop after it (`receiver` is None where nothing is sent)."""

    stage: int
    device: DeviceId
    compute_ms: float
    receiver: DeviceId | None = None
    hop_ms: float = 0.0
    bytes_ms: float = 0.0  # the hop without its latency


def decode_legs(
    model: ModelProfile, devices: Mapping[DeviceId, DeviceProfile], links: Links, stages: Sequence[Stage], batch: int
) -> tuple[Leg, ...]:
    """A lap of `batch` one-token sequences."""
    legs = []
    for place, stage in enumerate(stages):
        layers = model.layers[stage.first_layer : stage.last_layer + 1]
        compute = sum(layer_ms(devices[stage.device], layer, batch) for layer in layers)
        legs.append(_leg(model, links, stages, place, compute, batch))
    return tuple(legs)


def prompt_legs(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    stages: Sequence[Stage],
    tokens: int,
    final: bool,
) -> tuple[Leg, ...]:
    """A chunk of one prompt. Only the final chunk enters the head, with one token; the others end below it."""
    head = len(model.layers) - 1
    legs = []
    for place, stage in enumerate(stages):
        device, below = devices[stage.device], model.layers[stage.first_layer : min(stage.last_layer + 1, head)]
        compute = sum(layer_ms(device, layer, tokens) for layer in below)
        if stage.last_layer == head and final:
            compute += layer_ms(device, model.layers[head], 1)
        if stage.last_layer < head - 1:
            legs.append(_leg(model, links, stages, place, compute, tokens))
        elif final:
            legs.append(_leg(model, links, stages, place, compute, 1))
        else:
            legs.append(Leg(place, stage.device, _measured(compute)))
            break
    return tuple(legs)


def _leg(model: ModelProfile, links: Links, stages: Sequence[Stage], place: int, compute: float, tokens: int) -> Leg:
    stage, after = stages[place], stages[(place + 1) % len(stages)].device
    if after == stage.device:
        return Leg(place, stage.device, _measured(compute))
    nbytes = tokens * model.layers[stage.last_layer].output_bytes_per_token
    hop = _measured(hop_ms(links, stage.device, after, nbytes))
    return Leg(place, stage.device, _measured(compute), after, hop, hop - links[stage.device, after].latency_ms)


def _measured(cost_ms: float) -> float:
    if not isfinite(cost_ms):
        raise InfeasibleError("the plan crosses a link that is not there, or a device that was never measured")
    return cost_ms
