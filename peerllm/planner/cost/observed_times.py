"""Layer times refined by what the running plan's stages take: the plan's own steps, not the layers' profile, count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peerllm.planner.cost.layer_costs import batch_ms, layer_ms
from peerllm.types import DeviceId, DeviceProfile, ModelProfile, Stage

Points = tuple[tuple[int, float], ...]  # (tokens in a batch, milliseconds), rising in tokens


def with_observed_times(
    model: ModelProfile, devices: Mapping[DeviceId, DeviceProfile], stages: Sequence[Stage], paces: Mapping[int, Points]
) -> dict[DeviceId, DeviceProfile]:
    """`devices` with each one's layers stretched so that its stages of the plan take what they were seen to take.

    `paces`: by place in the plan, what a batch of one token each took there. Only sizes that were seen on all stages of
    a device tell of it, by their ratio to the profile; between them the ratio is linear, larger batches (prompts) stay.
    """
    result = dict(devices)
    for name, device in devices.items():
        places = [place for place, stage in enumerate(stages) if stage.device == name]
        if not places or any(not paces.get(place) for place in places):
            continue
        seen = [dict(paces[place]) for place in places]
        ratios = []
        for size in sorted(set(seen[0]).intersection(*seen[1:])):
            said = sum(_stage_ms(model, device, stages[place], size) for place in places)
            if said > 0:
                ratios.append((size, sum(times[size] for times in seen) / said))
        if ratios:
            result[name] = replace(
                device, layer_ms={kind: _stretched(points, ratios) for kind, points in device.layer_ms.items()}
            )
    return result


def _stage_ms(model: ModelProfile, device: DeviceProfile, stage: Stage, tokens: int) -> float:
    layers = model.layers[stage.first_layer : stage.last_layer + 1]
    return sum(layer_ms(device, layer, tokens) for layer in layers)


def _stretched(points: Points, ratios: Sequence[tuple[int, float]]) -> Points:
    most = ratios[-1][0]
    sizes = sorted({size for size, _ in points} | {size for size, _ in ratios})
    return tuple(
        (size, batch_ms(points, size) * (batch_ms(ratios, size) if size <= most else 1.0)) for size in sizes if points
    )
