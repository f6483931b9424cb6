"""The status object (docs/json.md): everything a person may want to know of the household. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peerllm import __version__
from peerllm.daemon.control_messages import DeploymentView, DeviceView, Hello
from peerllm.daemon.discovery.advert import printable_name
from peerllm.daemon.facade_objects import (
    DeploymentStatus,
    DeviceFacts,
    DeviceStatus,
    EngineStatus,
    HouseholdStatus,
    LinkStatus,
    NearbyDevice,
    NetworkStatus,
    StageStatus,
)
from peerllm.daemon.network import LinkFigure, Peer, Sighting
from peerllm.daemon.settings import Settings
from peerllm.engine.messages import EngineLoad
from peerllm.types import BITS, STORED, DeploymentId, DeviceId, LinkProfile

Name = Callable[[DeviceId], str]


def device_entry(device: DeviceId, hello: Hello | None, view: DeviceView | None) -> DeviceFacts:
    """What a device says of itself."""
    return {
        "id": device,
        "memory_bytes": hello.memory_bytes if hello else 0,
        "lent_bytes": hello.lent_bytes if hello else 0,
        "used_bytes": view.used_bytes if view else 0,
        "promised_bytes": view.promised_bytes if view else 0,
        "resident_bytes": view.resident_bytes if view else 0,
        "engine": view.engine if view else "",
        "leaving": view.leaving if view else "",
        "compute": {
            "place": printable_name(hello.place),
            "gbytes_per_s": dict(hello.gbytes_per_s),
            "gflops": dict(hello.gflops),
        }
        if hello
        else {},
        "version": hello.version if hello else "",
    }


def own_entry(
    device: DeviceId,
    settings: Settings,
    hello: Hello | None = None,
    view: DeviceView | None = None,
    *,
    state: str = "online",
    address: str = "",
    problem: str = "",
) -> DeviceStatus:
    """This device itself."""
    return {
        **device_entry(device, hello, view),
        "name": settings.name,
        "state": state,
        "rtt_ms": 0.0,
        "mbps": None,
        "address": address,
        "problem": problem,
    }


def status_object(
    me: DeviceStatus,
    settings: Settings,
    network: NetworkStatus,
    *,
    peers: Iterable[Peer] = (),
    links: Sequence[LinkStatus] = (),
    deployments: Sequence[DeploymentStatus] = (),
    sightings: Iterable[Sighting] = (),
) -> HouseholdStatus:
    """`me`: this device's entry; `network`: its control port, and what keeps it from finding others."""
    return {
        "device": {"id": me["id"], "name": me["name"]},
        "devices": [me, *(peer_entry(peer) for peer in peers)],
        "links": list(links),
        "deployments": list(deployments),
        "version": __version__,
        "api": f"{settings.api_host}:{settings.api_port}",
        "network": network,
        "nearby": [sighting_entry(sighting) for sighting in sightings],
    }


def starting_status(device: DeviceId, settings: Settings, doing: str) -> HouseholdStatus:
    """The status object while this device starts: its name is known, and `doing` says what it waits for."""
    me = own_entry(device, settings, state="starting", problem=f"is {doing}")
    return status_object(me, settings, {"port": settings.port, "problem": ""})


def peer_entry(peer: Peer) -> DeviceStatus:
    """Another device, also while it is away."""
    return {
        **device_entry(peer.device, peer.hello, peer.view),
        "name": peer.name,
        "state": peer.state,
        "rtt_ms": peer.rtt_ms,
        "mbps": peer.mbps,
        "address": f"{peer.hosts[0]}:{peer.control_port}" if peer.hosts else "",
        "problem": peer.problem,
    }


def link_entries(
    figures: Mapping[tuple[DeviceId, DeviceId], LinkFigure],
    planned: Mapping[tuple[DeviceId, DeviceId], LinkProfile],
    name: Name,
) -> list[LinkStatus]:
    """Every ordered pair, by name: as measured by either end, or what a plan would go by instead.

    `hop_ms` is what a small frame takes from engine to engine, `mbps` what its size adds to that.
    """
    entries: list[LinkStatus] = []
    for pair in sorted(figures.keys() | planned.keys(), key=lambda pair: (name(pair[0]), name(pair[1]), pair)):
        figure = figures.get(pair)
        profile = figure.profile if figure is not None else planned[pair]
        entries.append(
            {
                "from": name(pair[0]),
                "to": name(pair[1]),
                "rtt_ms": figure.rtt_ms if figure is not None else None,
                "mbps": profile.mbps,
                "hop_ms": profile.latency_ms,
                "source": figure.source if figure is not None else "guessed",
                "age_s": figure.age_s if figure is not None else None,
            }
        )
    return entries


def weights_form(dtype: str, quantize: str, wanted: str, form: str) -> str:
    """How weights are held, for people; "" while that is not known."""
    if not dtype:
        return ""
    if quantize == STORED:
        return f"{form}, as in the file" if form else "as in the file"
    if quantize not in BITS:
        return f"{'float32' if dtype == 'float32' else '16-bit'}, not rounded"
    if wanted == "auto":  # which rounds 16-bit models alone
        return f"16-bit, rounded to {BITS[quantize]} bits (--quantize none keeps them)"
    return f"rounded to {BITS[quantize]} bits (as asked for)"


def deployment_entry(view: DeploymentView, name: Name, profiles: Mapping[str, Any] | None = None) -> DeploymentStatus:
    """One deployment, devices by name; `profiles` are known where it is coordinated."""
    stages: list[StageStatus] = [
        {
            "device": name(stage.device),
            "first_layer": stage.first_layer,
            "last_layer": stage.last_layer,
            "memory_bytes": nbytes,
        }
        for stage, nbytes in zip(view.stages, view.stage_memory_bytes, strict=False)
    ]
    return {
        "id": view.deployment,
        "name": view.name,
        "model": view.model,
        "state": view.state,
        "epoch": view.epoch,
        "schedule": view.schedule,
        "activations": view.activations_wanted,
        "quantize": view.quantize_wanted,
        "weights": weights_form(view.dtype, view.quantize, view.quantize_wanted, view.form),
        "coordinator": name(view.coordinator),
        "plan": {
            "stages": stages,
            "dtype": view.dtype,
            "quantize": view.quantize,
            "activations": list(view.activations),
            "predicted": dict(view.predicted),
        },
        "measured": dict(view.measured),
        "profiles": dict(profiles or {}),
        "context": view.context,
        "reason": view.reason,
        "message": view.message,
        "progress": view.progress,
        "slots": view.slots,
    }


def engine_entry(load: EngineLoad) -> EngineStatus:
    """What an engine holds (stages with slots in use, bytes), how long steps take it, and counts since its start."""
    return {
        "stages": [{"deployment": one, "stage": stage, "slots_in_use": used} for one, stage, used in load.stages],
        "weight_bytes": load.weight_bytes,
        "kv_bytes": load.kv_bytes,
        "resident_bytes": load.resident_bytes,
        "decode_ms": dict(load.measured),
        "replayed_tokens": load.replayed_tokens,
        "dropped_frames": load.dropped_frames,
        "loaded_layers": load.loaded_layers,
    }


def sighting_entry(sighting: Sighting) -> NearbyDevice:
    """A device nearby that is not of the household; unproven."""
    return {
        "short_id": sighting.short_id,
        "name": sighting.name,
        "addresses": list(sighting.addresses),
        "port": sighting.port,
        "protocol": sighting.protocol,
        "inviting": bool(sighting.door),
    }


def deployments_of(
    own: Iterable[DeploymentView],
    peers: Mapping[DeviceId, Peer],
    name: Name,
    profiles: Mapping[DeploymentId, Mapping[str, Any]],
) -> Sequence[DeploymentStatus]:
    """This device's deployments first, then those the others tell of."""
    told = (view for peer in peers.values() if peer.view for view in peer.view.deployments)
    return [deployment_entry(view, name, profiles.get(view.deployment)) for view in (*own, *told)]
