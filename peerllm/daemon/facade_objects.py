"""The objects that facade.Household gives and docs/json.md describes, as far as they have fixed fields; parts first."""

from __future__ import annotations

from typing import Any, TypedDict


class DeviceName(TypedDict):
    id: str
    name: str


class DeviceCompute(TypedDict, total=False):
    """Empty while it is not known."""

    place: str
    gbytes_per_s: dict[str, float]
    gflops: dict[str, float]


class DeviceFacts(TypedDict):
    """What a device says of itself."""

    id: str
    memory_bytes: int
    lent_bytes: int
    used_bytes: int
    promised_bytes: int
    resident_bytes: int
    engine: str
    leaving: str
    compute: DeviceCompute
    version: str


class DeviceStatus(DeviceFacts):
    name: str
    state: str
    rtt_ms: float | None
    mbps: float | None
    address: str
    problem: str


LinkStatus = TypedDict(
    "LinkStatus",
    {
        "from": str,
        "to": str,
        "rtt_ms": float | None,
        "mbps": float,
        "hop_ms": float,
        "source": str,
        "age_s": float | None,
    },
)


class StageStatus(TypedDict):
    device: str
    first_layer: int
    last_layer: int
    memory_bytes: int


class PlanStatus(TypedDict):
    stages: list[StageStatus]
    dtype: str
    quantize: str
    activations: list[str]
    predicted: dict[str, Any]


class DeploymentStatus(TypedDict):
    id: str
    name: str
    model: str
    state: str
    epoch: int
    schedule: str
    activations: str
    quantize: str
    weights: str
    coordinator: str
    plan: PlanStatus
    measured: dict[str, float]
    profiles: dict[str, Any]
    context: int
    reason: str
    message: str
    progress: float
    slots: int


class NetworkStatus(TypedDict):
    """And what keeps the device from finding others."""

    port: int
    problem: str


class NearbyDevice(TypedDict):
    """A device that is not of the household; unproven."""

    short_id: str
    name: str
    addresses: list[str]
    port: int
    protocol: int
    inviting: bool


class HouseholdStatus(TypedDict):
    """What `peerllm status --json` prints."""

    device: DeviceName
    devices: list[DeviceStatus]
    links: list[LinkStatus]
    deployments: list[DeploymentStatus]
    version: str
    api: str
    network: NetworkStatus
    nearby: list[NearbyDevice]


class EngineStage(TypedDict):
    deployment: str
    stage: int
    slots_in_use: int


class EngineStatus(TypedDict):
    """What an engine holds, how long steps take it, and counts since its start."""

    stages: list[EngineStage]
    weight_bytes: int
    kv_bytes: int
    resident_bytes: int
    decode_ms: dict[str, float]
    replayed_tokens: int
    dropped_frames: int
    loaded_layers: int


class LimitsStatus(TypedDict):
    """What an owner allows (decide/owner_limits.OwnerLimits), and why nothing is lent now, or ""."""

    memory_bytes: int | None
    threads: int | None
    hours: list[int] | None  # two minutes of the day
    battery_percent: int | None
    hot_celsius: float | None
    paused: bool
    leaving: str


class MeasuredSpeed(TypedDict):
    """Of answers of a fixed length, in milliseconds and tokens per second."""

    sequences: int
    prompt_tokens: int
    output_tokens: int
    time_to_first_token_ms: list[float]
    step_ms: list[float]
    tokens_per_second: float
    steady_tokens_per_second: float | None


class Preview(TypedDict):
    """What would be planned: the scenario's file, the tokens of its largest prompt chunk, the layers whose outputs
    would travel as int8, and in words how weights would be held.
    """

    scenario: dict[str, Any]
    most_chunk: int | None
    rounded_layers: list[int]
    weights: str
