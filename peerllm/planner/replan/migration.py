"""The cost of changing from one plan to another: weights to load, KV to move or rebuild, and the pause."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from peerllm.errors import InfeasibleError
from peerllm.planner.cost.layer_costs import (
    SOURCE_LAYERS,
    Links,
    hop_ms,
    kv_bytes,
    layer_bytes,
    layer_ms,
    pass_ms,
    stages_of,
    tokens_entering,
)
from peerllm.types import DeviceId, DeviceProfile, ModelProfile, Stage, Workload

DISK_MBPS = 4000.0  # a plain solid-state disk, if not measured
Placement = tuple[DeviceId, ...]  # the device of each layer


def placement_of(stages: Sequence[Stage]) -> Placement:
    """The device of each layer of these stages."""
    return tuple(stage.device for stage in stages for _ in range(stage.first_layer, stage.last_layer + 1))


@dataclass(frozen=True, slots=True)
class Holdings:
    """Which layers of the model each device has: `loaded` in memory, ready to compute; `cached` on its own disk."""

    loaded: Mapping[DeviceId, frozenset[int]] = field(default_factory=dict)
    cached: Mapping[DeviceId, frozenset[int]] = field(default_factory=dict)

    def has(self, device: DeviceId, layer: int) -> bool:
        """Whether other devices can fetch the layer from this one."""
        return layer in self.loaded.get(device, ()) or layer in self.cached.get(device, ())


@dataclass(frozen=True, slots=True)
class LoadRates:
    """How fast weights are read from a device's own disk, and from the internet if that is allowed."""

    disk_mbps: Mapping[DeviceId, float] | float = DISK_MBPS
    hub_mbps: float | None = None

    def disk(self, device: DeviceId) -> float:
        return self.disk_mbps.get(device, DISK_MBPS) if isinstance(self.disk_mbps, Mapping) else self.disk_mbps


@dataclass(frozen=True, slots=True)
class Migration:
    """The work of one change of plan; transfers are counted one after the other."""

    background_ms: float  # loading while the running plan still serves
    pause_ms: float  # nothing is served: KV sent or rebuilt, and loading where old and new layers do not fit together
    ready_ms: float  # until the switch, if all devices load at once
    load_bytes: Mapping[DeviceId, int]
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class RunningState:
    """The running plan and what each device has. `placement` is empty if no plan runs."""

    model: ModelProfile
    devices: Mapping[DeviceId, DeviceProfile]
    links: Links
    source: DeviceId
    workload: Workload
    placement: Placement
    held: Holdings
    rates: LoadRates = field(default_factory=LoadRates)
    in_flight: Sequence[int] = ()  # tokens so far of each sequence
    working: Mapping[DeviceId, int] = field(default_factory=dict)

    lost: tuple[int, ...] = field(
        init=False
    )  # layers of the running plan that are no longer in memory; all, if no plan runs
    serving: bool = field(init=False)  # the running plan works: all in memory, all links there, the same source

    def __post_init__(self) -> None:
        held = self.held.loaded
        there = enumerate(self.placement)
        lost = tuple(i for i, d in there if d not in self.devices or i not in held.get(d, ()))
        object.__setattr__(self, "lost", lost if self.placement else tuple(range(len(self.model.layers))))
        works = not self.lost and self.placement[0] == self.source
        ring = stages_of(self.placement)
        works = works and pass_ms(self.model, self.devices, self.links, ring, (1,)) < inf
        object.__setattr__(self, "serving", works)

    @property
    def replayed(self) -> int:
        """The last layer through which tokens in flight must be computed again because KV was lost; -1 if none."""
        return max(self.lost, default=-1)

    def shares(self, layer: int, device: DeviceId) -> bool:
        """Whether the layer needs no weights of its own there: it shares those of a layer that stays on the source."""
        shared = self.model.layers[layer].tied_to
        return device == self.source and shared is not None and shared < SOURCE_LAYERS

    def load_bytes(self, layer: int, device: DeviceId) -> int:
        """The weights of a layer that a device still has to load."""
        ready = layer in self.held.loaded.get(device, ()) or self.shares(layer, device)
        return 0 if ready else self.model.layers[layer].memory_bytes

    def load_ms(self, layer: int, device: DeviceId) -> float:
        """Loading from the fastest place: own disk, another device, the internet; infinite if nobody has the layer."""
        nbytes = self.load_bytes(layer, device)
        if not nbytes:
            return 0.0
        have_it = [d for d in self.devices if d != device and self.held.has(d, layer)]
        times_ms = [hop_ms(self.links, d, device, nbytes) for d in have_it]
        if layer in self.held.cached.get(device, ()):
            times_ms.append(_ms(nbytes, self.rates.disk(device)))
        if self.rates.hub_mbps:
            times_ms.append(_ms(nbytes, self.rates.hub_mbps))
        return min(times_ms, default=inf)

    def kv_bytes(self, layer: int) -> int:
        """The KV of all sequences in flight in one layer."""
        return sum(kv_bytes(self.model.layers[layer], 1, tokens) for tokens in self.in_flight)

    def carried_bytes(self, layer: int, device: DeviceId) -> int:
        """KV that must be sent to `device`: none if it is there already, or is computed again."""
        return 0 if layer <= self.replayed or self.placement[layer] == device else self.kv_bytes(layer)

    def kv_ms(self, layer: int, device: DeviceId) -> float:
        """Sending a layer's KV to a device, or computing it again there; hops of a replay are left out."""
        if layer <= self.replayed:
            runs = tokens_entering(self.model, layer, self.in_flight) if self.in_flight else ()
            return sum(layer_ms(self.devices[device], self.model.layers[layer], tokens) for tokens in runs)
        nbytes = self.carried_bytes(layer, device)
        return self._sent_ms(self.placement[layer], device, nbytes) if nbytes else 0.0

    def _sent_ms(self, sender: DeviceId, receiver: DeviceId, nbytes: int) -> float:
        """Sent directly, or over one other device where there is no direct link."""
        straight = hop_ms(self.links, sender, receiver, nbytes)
        if straight < inf:
            return straight
        return min(
            hop_ms(self.links, sender, d, nbytes) + hop_ms(self.links, d, receiver, nbytes) for d in self.devices
        )

    def overflows(self, device: DeviceId, layers: Iterable[int]) -> bool:
        """Whether `layers` do not fit on a device beside those of the running plan."""
        kept = {i for i, home in enumerate(self.placement) if home == device} | set(layers)
        shared = {i: self.model.layers[i].tied_to for i in kept}
        needed = sum(layer_bytes(self.model, i, self.workload, shared[i] in kept) for i in kept)
        return needed > self.devices[device].memory_bytes - self.working.get(device, 0)

    def reachable(self) -> None:
        """Raise InfeasibleError for a layer that no device can load."""
        for i, layer in enumerate(self.model.layers):
            if all(self.load_ms(i, device) == inf for device in self.devices):
                raise InfeasibleError(f"no device that is here has layer {i} ({layer.name}) of {self.model.name}")

    def migration(self, placement: Placement) -> Migration:
        """The cost of changing to `placement`."""
        background = pause = 0.0
        loading: dict[DeviceId, int] = {}
        own_ms: dict[DeviceId, float] = {}
        new: dict[DeviceId, list[int]] = {}
        for i, home in enumerate(placement):
            new.setdefault(home, []).append(i)
        for device, layers in new.items():
            own_ms[device] = sum(self.load_ms(i, device) for i in layers)
            nbytes = sum(self.load_bytes(i, device) for i in layers)
            if nbytes:
                loading[device] = nbytes
            if not self.serving or self.overflows(device, layers):
                pause += own_ms[device]
            else:
                background += own_ms[device]
        waits = sum(self.kv_ms(i, home) for i, home in enumerate(placement))
        carried = sum(self.carried_bytes(i, home) for i, home in enumerate(placement))
        return Migration(background, pause + waits, max(own_ms.values()) + waits, loading, carried)


def _ms(nbytes: int, mbps: float) -> float:
    return nbytes * 8 / (mbps * 1000)
