"""A scenario as a JSON object in the format of scenario files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

from peerllm.planner.scenario.scenario import Scenario
from peerllm.types import DeviceId, DeviceProfile, Layer


def scenario_file(scenario: Scenario) -> dict[str, Any]:
    """What `parse` reads back. Devices are named by name, and where two share one, also by the start of their ids."""
    names = names_in(scenario.devices)
    work = {name: value for name, value in asdict(scenario.workload).items() if value is not None}
    del work["objective"]
    return {
        "model": {"name": scenario.model.name, "layers": _layers(scenario.model.layers)},
        "devices": [
            {
                "name": names[device],
                "memory_bytes": profile.memory_bytes,
                "layer_ms": {
                    kind: {str(tokens): ms for tokens, ms in points} for kind, points in profile.layer_ms.items()
                },
            }
            for device, profile in scenario.devices.items()
        ],
        "links": {
            "default": None,
            "pairs": [
                {"from": names[a], "to": names[b], "mbps": link.mbps, "latency_ms": link.latency_ms}
                for (a, b), link in scenario.links.items()
            ],
        },
        "source": names[scenario.source],
        "cloud": None if scenario.cloud is None else names[scenario.cloud],
        "workload": work,
        "shared_media": [
            {"name": medium.name, "links": sorted([names[a], names[b]] for a, b in medium.links)}
            for medium in scenario.media
        ],
    }


def names_in(devices: Mapping[DeviceId, DeviceProfile]) -> dict[DeviceId, str]:
    """The name of each device in the scenario file."""
    count = Counter(profile.name for profile in devices.values())
    return {
        device: profile.name if count[profile.name] == 1 else f"{profile.name} {device[:8]}"
        for device, profile in devices.items()
    }


def _layers(layers: tuple[Layer, ...]) -> list[dict[str, Any]]:
    """The layers; neighbours that differ only in their names become one entry with a count."""

    def entry(layer: Layer) -> dict[str, Any]:
        found = {key: value for key, value in asdict(layer).items() if value is not None and key != "name"}
        if not layer.state_bytes_per_sequence:
            del found["state_bytes_per_sequence"]
        return found

    result = []
    for fields, alike in groupby(layers, entry):
        group = list(alike)
        repeat = {"repeat": len(group)} if len(group) > 1 else {}
        result.append({"name": group[0].name if len(group) == 1 else fields["kind"], **fields, **repeat})
    return result
