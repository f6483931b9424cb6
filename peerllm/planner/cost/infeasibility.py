"""Why no plan fits, in one line: the bytes missing in total, or the layer that fits nowhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, layer_bytes, layer_ms
from peerllm.types import DeviceId, DeviceProfile, ModelProfile, Workload


def explain_infeasible(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    source: DeviceId,
    workload: Workload,
    working: Mapping[DeviceId, int],
    *,
    head_on_source: bool = False,
    reached: int | None = None,
    proven: bool = True,
) -> InfeasibleError:
    """The error to raise when no plan was found.

    `reached` is the last layer that the search placed, if known; `working` bytes are taken off each device; without
    `proven` the search gave up, and the message says so.
    """
    room = {device: profile.memory_bytes - working.get(device, 0) for device, profile in devices.items()}
    last = len(model.layers) - 1

    def needs(i: int, device: DeviceId) -> int:
        tied = model.layers[i].tied_to
        return layer_bytes(model, i, workload, device == source and tied is not None and tied < SOURCE_LAYERS)

    def hosts(i: int) -> list[DeviceId]:
        bound = i < SOURCE_LAYERS or (head_on_source and i == last)
        options = [source] if bound else list(devices)
        return [d for d in options if room[d] >= 0 and isfinite(layer_ms(devices[d], model.layers[i], 1))]

    needed = sum(needs(i, source) for i in range(last + 1))  # as if all were on the source, where a tied head is free
    lent = sum(max(0, nbytes) for nbytes in room.values())
    if needed > lent:
        sizes = f"needs {human_bytes(needed)}, the devices lend {human_bytes(lent)}"
        return InfeasibleError(f"{model.name} {sizes}: {human_bytes(needed - lent)} are missing", needed - lent)
    for i, layer in enumerate(model.layers):
        if not any(needs(i, device) <= room[device] for device in hosts(i)):
            where = "the source" if hosts(i) == [source] else "any device that may hold it"
            return InfeasibleError(f"layer {i} ({layer.name}) of {model.name} does not fit on {where}")
    start = sum(needs(i, source) for i in range(SOURCE_LAYERS))
    if start > room[source]:
        name, short = devices[source].name, human_bytes(start - room[source])
        return InfeasibleError(f"layers 0 and 1 of {model.name} must lie on {name}, which lends {short} too little")
    stuck = min(max(_packed(model, room, source, needs), -1 if reached is None else reached) + 1, last)
    which = f"layer {stuck} ({model.layers[stuck].name})"
    doubt = "" if proven else "; no cut was found, though one may exist"
    return InfeasibleError(f"{which} of {model.name} fits nowhere beside the others, or no link leads there{doubt}")


def _packed(
    model: ModelProfile, room: Mapping[DeviceId, int], source: DeviceId, needs: Callable[[int, DeviceId], int]
) -> int:
    """The last layer placed when each device takes what it can: the source first, then the roomiest."""
    placed = -1
    for device in (source, *sorted((d for d in room if d != source), key=lambda d: -room[d])):
        left = room[device]
        while placed + 1 < len(model.layers) and needs(placed + 1, device) <= left:
            placed += 1
            left -= needs(placed, device)
    return placed
