"""Neighbours of a plan with one contiguous range per device: what re-planning for throughput tries."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, stages_of
from peerllm.types import DeviceId, Stage

Shares = tuple[tuple[DeviceId, int], ...]  # (device, number of layers) in order
Ranges = tuple[Shares, bool]  # the shares, and whether the head is back on the source


def ranges_of(stages: Sequence[Stage], source: DeviceId) -> Ranges:
    """(layers of each device in order, whether the head is back on the source) of these stages."""
    back = len(stages) > 1 and stages[-1].device == source
    body = stages[:-1] if back else stages
    return tuple((stage.device, stage.last_layer + 1 - stage.first_layer) for stage in body), back


def one_range_each(stages: Sequence[Stage], source: DeviceId) -> bool:
    """Whether no device has two ranges; the source may also hold the head."""
    cut, _ = ranges_of(stages, source)
    return len(dict(cut)) == len(cut)


def stages_of_ranges(ranges: Ranges, source: DeviceId) -> tuple[Stage, ...]:
    """The inverse of `ranges_of`."""
    cut, back = ranges
    return stages_of([device for device, layers in cut for _ in range(layers)] + [source] * back)


def neighbour_plans(ranges: Ranges, devices: Collection[DeviceId], source: DeviceId) -> Iterator[Ranges]:
    """Shift a boundary; drop, add or exchange a device; move the head. Layers that must stay on the source do."""
    cut, back = ranges
    for changed in _cuts(cut, devices):
        if changed[0][1] >= SOURCE_LAYERS and all(layers > 0 for _, layers in changed):
            alone = back and len(changed) == 1  # then the head belongs to the only range
            yield (((source, changed[0][1] + 1),), False) if alone else (changed, back)
    (last, layers), rest = cut[-1], cut[:-1]
    if back:
        yield (*rest, (last, layers + 1)), False
    elif rest and layers > 1:
        yield (*rest, (last, layers - 1)), True


def _sizes(layers: int) -> list[int]:
    """1, 2, 4, ... and all of them."""
    return sorted({1 << k for k in range(layers.bit_length()) if 1 << k < layers} | {layers})


def _cuts(cut: Shares, devices: Collection[DeviceId]) -> Iterator[Shares]:
    unused = [device for device in sorted(devices) if device not in dict(cut)]
    for place, ((left, many), (right, more)) in enumerate(pairwise(cut)):
        before, after = cut[:place], cut[place + 2 :]
        for moved in _sizes(more):  # all: the device is dropped
            rest = ((right, more - moved),) if moved < more else ()
            yield (*before, (left, many + moved), *rest, *after)
        for moved in _sizes(many):
            rest = ((left, many - moved),) if moved < many else ()
            if rest or place:  # the source stays first
                yield (*before, *rest, (right, more + moved), *after)
    for place, (device, layers) in enumerate(cut):
        for new in unused:
            for moved in _sizes(layers):
                rest = ((device, layers - moved),) if moved < layers else ()
                if rest or place:
                    yield (*cut[:place], *rest, (new, moved), *cut[place + 1 :])
                if rest and place:
                    yield (*cut[:place], (new, moved), *rest, *cut[place + 1 :])
