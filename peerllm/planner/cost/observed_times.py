"""Layer times corrected by what the stages of the running plan were observed to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from peerllm.planner.cost.layer_costs import batch_ms, layer_ms
from peerllm.types import DeviceId, DeviceProfile, ModelProfile, Stage

Points = tuple[tuple[int, float], ...]  # (tokens in a batch, milliseconds), rising in tokens


def with_observed_times(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    stages: Sequence[Stage],
    observed: Mapping[int, Points],
) -> dict[DeviceId, DeviceProfile]:
    """`devices` with layer times scaled so that their stages take the observed times.

    `observed`: for each stage of the plan, the time of batches of one token per sequence. A batch size counts where it
    was observed on all stages of a device; the ratio to the profile is interpolated between sizes, and batches larger
    than any observed (prompts) stay as they are.
    """
    result = dict(devices)
    for name, device in devices.items():
        places = [place for place, stage in enumerate(stages) if stage.device == name]
        if not places or any(not observed.get(place) for place in places):
            continue
        seen = [dict(observed[place]) for place in places]
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
