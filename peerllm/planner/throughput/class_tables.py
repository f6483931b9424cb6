"""What each class of devices needs, in milliseconds and bytes, for any micro-batch: profiles as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from peerllm.planner.arrays import Floats, Ints
from peerllm.planner.cost.layer_costs import SOURCE_LAYERS, Links, layer_bytes, layer_ms
from peerllm.planner.routing.device_classes import device_classes
from peerllm.planner.routing.route_graph import RouteGraph
from peerllm.types import DeviceId, DeviceProfile, ModelProfile, Stage, Workload


@dataclass(slots=True)
class ClassTables:
    """Everything about a model and a household that does not depend on the batch size."""

    model: ModelProfile
    devices: Mapping[DeviceId, DeviceProfile]
    members: list[list[DeviceId]]  # by class; the first is the source
    memory: Ints  # [classes with the source, layers + 1] prefix
    room: Ints  # [classes with the source]
    shared: int  # bytes saved by a tied head that returns to the source
    latency: Floats  # [from, to], classes with the source; infinite without a link
    ms_per_byte: Floats  # [from, to]: milliseconds a byte
    class_size: Ints  # [classes without the source]
    output: Floats  # [layers]: bytes per token leaving each layer
    _times: dict[int, Floats] = field(default_factory=dict)

    def compute(self, batch: int) -> Floats:
        """[classes with the source, layers]: milliseconds of one layer for `batch` tokens."""
        if batch not in self._times:
            kinds = {layer.kind: layer for layer in self.model.layers}
            order = {kind: place for place, kind in enumerate(kinds)}
            rows = np.array(
                [[layer_ms(self.devices[group[0]], layer, batch) for layer in kinds.values()] for group in self.members]
            )
            self._times[batch] = rows[:, [order[layer.kind] for layer in self.model.layers]]
        return self._times[batch]

    def graph(self, low: int, high: int, head_home: bool) -> RouteGraph | None:
        """Costs that no batch of low..high sequences can beat.

        None if the source cannot hold even the layers that must stay there.
        """
        compute = np.min([self.compute(batch) for batch in range(low, high + 1)], axis=0)
        layers = compute.shape[1]
        last = layers - 2 if head_home else layers - 1
        prefix = np.zeros((len(compute), layers + 1))
        prefix[:, 1:] = compute.cumsum(axis=1)
        head_ms = compute[0, -1] if head_home else 0.0
        head_bytes = int(self.memory[0, -1] - self.memory[0, -2]) - self.shared if head_home else 0
        first = prefix[0, 1 : last + 2] + head_ms
        held = self.memory[0, 1 : last + 2] + head_bytes
        first = np.where(held <= self.room[0], first, np.inf)
        first[: SOURCE_LAYERS - 1] = np.inf
        if not np.isfinite(first).any():
            return None
        hop = (
            self.latency[None] + low * self.output[:, None, None] * self.ms_per_byte[None]
        )  # infinite where there is no link
        starts = np.arange(last + 1)
        fits = np.array(
            [
                np.searchsorted(row[: last + 2], row[: last + 1] + room, side="right") - 2
                for row, room in zip(self.memory[1:], self.room[1:], strict=True)
            ],
            dtype=np.int64,
        ).reshape(len(self.class_size), last + 1)
        fits[:, :SOURCE_LAYERS] = starts[:SOURCE_LAYERS] - 1
        finite = np.where(np.isfinite(prefix), prefix, np.nan)
        if np.isnan(finite).any():
            fits, prefix = _measured_only(compute, fits, prefix)
        fits = np.maximum(fits, starts - 1)
        return RouteGraph(
            first, prefix[1:, : last + 2], fits, hop[: last + 1, :, 1:], hop[last, 1:, 0], self.class_size
        )

    def stages(self, route: Sequence[tuple[int, int]], head_home: bool) -> tuple[Stage, ...]:
        """(class, last layer) of each visit as stages; the members of a class are used in their order."""
        taken = [0] * len(self.members)
        stages: list[Stage] = []
        start = 0
        for kind, end in route:
            stages.append(Stage(self.members[kind + 1][taken[kind + 1]], start, end))
            taken[kind + 1] += 1
            start = end + 1
        if head_home:
            stages.append(Stage(self.members[0][0], start, len(self.model.layers) - 1))
        return tuple(stages)


def _measured_only(compute: Floats, fits: Ints, prefix: Floats) -> tuple[Ints, Floats]:
    """Visits end before a layer that the class was never measured for; its infinite time stays out of the sums."""
    known = np.isfinite(compute)
    clean = np.zeros_like(prefix)
    clean[:, 1:] = np.where(known, compute, 0.0).cumsum(axis=1)
    fits = fits.copy()
    for j in range(len(fits)):
        bad = np.flatnonzero(~known[j + 1])
        for start in range(fits.shape[1]):
            nearest = bad[bad >= start]
            if len(nearest):
                fits[j, start] = min(fits[j, start], int(nearest[0]) - 1)
    return fits, clean


def class_tables(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    source: DeviceId,
    workload: Workload,
    working: Mapping[DeviceId, int],
) -> ClassTables:
    """`working` bytes are taken off the room of each device."""
    order = (source, *sorted(device for device in devices if device != source))
    room = {device: devices[device].memory_bytes - working.get(device, 0) for device in order}
    members = device_classes(devices, links, order, room)
    sizes = np.array([layer_bytes(model, i, workload) for i in range(len(model.layers))], dtype=np.int64)
    prefix = np.concatenate([[0], sizes.cumsum()])
    head = len(model.layers) - 1
    tied = model.layers[head].tied_to
    saved = layer_bytes(model, head, workload) - layer_bytes(model, head, workload, True) if tied is not None else 0
    latency = np.full((len(members), len(members)), np.inf)
    ms_per_byte = np.zeros_like(latency)
    for a, group in enumerate(members):
        for b, other in enumerate(members):
            pair = (group[0], other[0]) if a != b else (group[0], group[-1])
            link = links.get(pair) if pair[0] != pair[1] else None
            if link is not None:
                latency[a, b], ms_per_byte[a, b] = link.latency_ms, 8 / (link.mbps * 1000)
    return ClassTables(
        model,
        devices,
        members,
        np.tile(prefix, (len(members), 1)),
        np.array([room[group[0]] for group in members], dtype=np.int64),
        saved if tied is not None and tied < SOURCE_LAYERS else 0,
        latency,
        ms_per_byte,
        np.array([len(group) for group in members[1:]], dtype=np.int64),
        np.array([layer.output_bytes_per_token for layer in model.layers], dtype=float),
    )
