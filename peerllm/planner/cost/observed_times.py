"""Layer times corrected by what the stages of the running plan were observed to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from peerllm.planner.cost.layer_costs import batch_ms, layer_ms
from peerllm.types import DeviceId, DeviceProfile, ModelProfile, Stage

Points = tuple[tuple[int, float], ...]  # (tokens in a batch, milliseconds), rising in tokens
MISJUDGED = 2.0  # times as long as measured, beside the plan's other devices: its measurement was wrong
SLIGHT_MS = 2.0  # a batch that takes so little longer matters to nobody


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
    for name, ratios in _ratios(model, devices, stages, observed).items():
        result[name] = replace(
            devices[name],
            layer_ms={kind: _stretched(points, ratios) for kind, points in devices[name].layer_ms.items()},
        )
    return result


def slower_than_measured(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    stages: Sequence[Stage],
    observed: Mapping[int, Points],
) -> dict[DeviceId, float]:
    """The devices that take MISJUDGED times as long as their profiles say, and how many times.

    What all of the plan's devices take longer than was measured is not counted, nor less than SLIGHT_MS a batch.
    """
    ratios = {
        name: median(ratio for _, ratio in told) for name, told in _ratios(model, devices, stages, observed).items()
    }
    usual = max(1.0, min(ratios.values(), default=1.0))
    result = {}
    for name, ratio in ratios.items():
        least = sum(min(ms for _, ms in observed[i]) for i, stage in enumerate(stages) if stage.device == name)
        if ratio >= MISJUDGED * usual and least * (1 - usual / ratio) >= SLIGHT_MS:
            result[name] = ratio / usual
    return result


def _ratios(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    stages: Sequence[Stage],
    observed: Mapping[int, Points],
) -> dict[DeviceId, list[tuple[int, float]]]:
    """For each device whose stages were all observed: (tokens in a batch, times as long as its profile says)."""
    result = {}
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
            result[name] = ratios
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
