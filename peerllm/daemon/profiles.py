"""What the planner is told: device profiles from what devices say they measured, links from what was seen of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peerllm.daemon.messages import Hello
from peerllm.engine.messages import Inspected
from peerllm.planner.memory import Shape
from peerllm.types import DeviceId, DeviceProfile, LinkProfile, ModelProfile

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCHES = (1, 4, 16, 64, 256)  # tokens at which a layer's time is told; linear between
LAYER_OVERHEAD_MS = 0.02  # a pass through a layer costs at least this however small the layer
FRAME_MS = 0.3  # handing a frame to the network and taking it off costs this beside the wire
UNKNOWN_RTT_MS = 2.0  # a link not yet measured
UNKNOWN_MBPS = 100.0
SLOWEST_GBYTES_PER_S = 0.5  # of a device that says nothing
SLOWEST_GFLOPS = 1.0
MOST_MEMORY_BYTES = 1 << 50  # whatever a device says: the planner adds devices up in 64 bits


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that could take part: what it says of itself, what is free of what it lends, and how it is reached."""

    device: DeviceId
    hello: Hello
    free_bytes: int
    rtt_ms: float | None = None
    mbps: float | None = None


def able(candidate: Candidate, architecture: str, dtype: str) -> bool:
    """Whether the device's engine can compute this model at all."""
    return architecture in candidate.hello.architectures and dtype in candidate.hello.dtypes


def device_profile(candidate: Candidate, model: ModelProfile, dtype: str) -> DeviceProfile:
    """Layer times: the slower of reading the weights once and of computing every token."""
    hello = candidate.hello
    bytes_per_ms = max(hello.gbytes_per_s.get(dtype, 0.0), SLOWEST_GBYTES_PER_S) * 1e6
    flops_per_ms = max(hello.gflops.get(dtype, 0.0), SLOWEST_GFLOPS) * 1e6
    times: dict[str, tuple[tuple[int, float], ...]] = {}
    for layer in model.layers:
        weights = 0 if layer.kind == "embedding" else layer.memory_bytes  # a look-up reads a row a token
        each = 2 * weights / ITEMSIZE[dtype] / flops_per_ms
        once = weights / bytes_per_ms
        times[layer.kind] = tuple((n, LAYER_OVERHEAD_MS + max(once, n * each)) for n in BATCHES)
    return DeviceProfile(candidate.device, hello.name, min(max(0, candidate.free_bytes), MOST_MEMORY_BYTES), times)


def link_profiles(
    candidates: Mapping[DeviceId, Candidate], source: DeviceId
) -> dict[tuple[DeviceId, DeviceId], LinkProfile]:
    """Every ordered pair. Between two others only the slower of their ways to the source is known: it is taken."""

    def way(device: DeviceId) -> tuple[float, float]:
        if device == source:
            return 0.0, float("inf")
        seen = candidates[device]
        return seen.rtt_ms if seen.rtt_ms is not None else UNKNOWN_RTT_MS, seen.mbps or UNKNOWN_MBPS

    links = {}
    for a in candidates:
        for b in candidates:
            if a != b:
                (rtt_a, mbps_a), (rtt_b, mbps_b) = way(a), way(b)
                links[a, b] = LinkProfile(max(rtt_a, rtt_b) / 2 + FRAME_MS, min(mbps_a, mbps_b))
    return links


def model_shape(inspected: Inspected) -> Shape:
    """What the working space depends on, from config.json; cautious guesses where it names a thing its own way."""
    text: Any = json.loads(inspected.config)
    text = text.get("text_config") or text
    wide = _first(text, ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")) or 4 * inspected.hidden_size
    return Shape(inspected.hidden_size, inspected.vocabulary, wide, ITEMSIZE[inspected.dtype])


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0
