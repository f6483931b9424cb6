"""A scenario: the model, devices, links and workload that a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peerllm.planner.cost.layer_costs import Links
from peerllm.types import DeviceId, DeviceProfile, Medium, ModelProfile, Workload

OBJECTIVES = ("latency", "throughput")
STRATEGIES = (
    "edgeshard",
    "edge-solo",
    "cloud-edge-even",
    "cloud-edge-opt",
    "even",
    "edgeshard-even",
    "edgeshard-paper",
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to plan for. A device's id is its name; `links` has only the links that exist."""

    model: ModelProfile
    devices: Mapping[DeviceId, DeviceProfile]
    links: Links
    source: DeviceId
    cloud: DeviceId | None
    workload: Workload
    media: tuple[Medium, ...] = ()
