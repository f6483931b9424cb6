"""What the planner is told: device profiles from what devices say they measured, links from what was seen of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from peerllm.daemon.control_messages import Hello
from peerllm.daemon.network.speed.link_tables import UNKNOWN_FRAME_MS
from peerllm.engine.messages import FURTHER_TOKENS, PASS, attention
from peerllm.types import DeviceId, DeviceProfile, LayerKind, LinkProfile, ModelProfile, Workload

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCHES = (1, 4, 16, 64, 256)  # tokens at which a layer's time is told; linear between
MAX_POINTS = 16  # token counts of a kind that another device may tell
MAX_TOKENS = 1 << 16
MAX_MS = 1e7
LAYER_OVERHEAD_MS = 0.02  # a pass through a layer costs at least this however small the layer
UNKNOWN_RTT_MS = 2.0  # a link not yet measured
UNKNOWN_MBPS = 100.0
SLOWEST_GBYTES_PER_S = 0.5  # of a device that says nothing
SLOWEST_GFLOPS = 1.0
MOST_MEMORY_BYTES = 1 << 50  # whatever a device says: the planner adds devices up in 64 bits


Points = tuple[tuple[int, float], ...]  # tokens, milliseconds
LayerTimes = Mapping[LayerKind, Points]
Source = Literal["measured", "cached", "estimated"]


@dataclass(frozen=True, slots=True)
class MeasuredLayers:
    """What a device measured of a model's layers, alone; and how many times longer they take in company."""

    alone: LayerTimes = field(default_factory=dict)
    contention: float = 1.0  # while all devices of its machine compute
    source: Source = "estimated"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that could take part: what it says of itself, what is free of what it lends, and how it is reached."""

    device: DeviceId
    hello: Hello
    free_bytes: int
    rtt_ms: float | None = None
    mbps: float | None = None
    timing: MeasuredLayers = MeasuredLayers()
    hops: Mapping[DeviceId, LinkProfile] = field(default_factory=dict)  # measured ways from it


def kinds_of(model: ModelProfile) -> tuple[LayerKind, ...]:
    """Everything a device is asked to time of a model."""
    kinds = tuple(dict.fromkeys(layer.kind for layer in model.layers))
    return (PASS, *kinds, *(attention(kind) for kind in kinds if kind not in ("embedding", "head")))


def machine_contention(candidates: Iterable[Candidate]) -> dict[DeviceId, float]:
    """How many times longer layers take while all devices of a machine compute: their threads over its processors."""
    machines: dict[str, list[Candidate]] = {}
    for one in candidates:
        machines.setdefault(one.hello.machine or one.device, []).append(one)
    found: dict[DeviceId, float] = {}
    for group in machines.values():
        processors = max(1, *(one.hello.processors for one in group))
        threads = sum(min(max(1, one.hello.threads), processors) for one in group)
        found |= dict.fromkeys((one.device for one in group), threads / processors)
    return {device: max(1.0, longer) for device, longer in found.items()}


def checked(told: LayerTimes, kinds: tuple[LayerKind, ...]) -> dict[LayerKind, tuple[tuple[int, float], ...]]:
    """The kinds whose times are plausible; another device may say anything, and the rest counts as not measured."""
    return {kind: points for kind in kinds if (points := told.get(kind, ())) and _plausible(points)}


def _plausible(points: tuple[tuple[int, float], ...]) -> bool:
    counts = [count for count, _ in points]
    return (
        len(points) <= MAX_POINTS
        and counts[0] >= 1
        and counts[-1] <= MAX_TOKENS
        and all(a < b for a, b in pairwise(counts))
        and all(math.isfinite(ms) and 0 < ms <= MAX_MS for _, ms in points)
    )


def able(candidate: Candidate, architecture: str, dtype: str) -> bool:
    """Whether the device's engine can compute this model at all."""
    return architecture in candidate.hello.architectures and dtype in candidate.hello.dtypes


def slower_than_estimated(candidates: Iterable[Candidate], model: ModelProfile, dtype: str) -> float:
    """How much longer than estimated a block takes the devices that measured it, at least 1: the median.

    A guess that stands beside measurements must not look the fastest for being a guess.
    """
    ratios = []
    for one in candidates:
        for kind, points in estimated(one, model, dtype).items():
            measured = one.timing.alone.get(kind)
            if measured and kind not in ("embedding", "head"):
                ratios.append(measured[0][1] / points[0][1])
    return max(1.0, median(ratios)) if ratios else 1.0


def device_profile(
    candidate: Candidate, model: ModelProfile, work: Workload, dtype: str, devices: int = 1, slower: float = 1.0
) -> DeviceProfile:
    """Layer times as measured, or else estimated; with what attention adds where the workload's tokens stand.

    For throughput all devices of a machine compute at the same time. Estimates count `slower` times.

    A layer has no part in what a pass costs beside its layers, but plans add up layers only. So the passes of a plan
    over `devices` are spread evenly over the model's blocks: right for even stages, little off for others.
    """
    measured, estimate = candidate.timing.alone, estimated(candidate, model, dtype)
    stretch = candidate.timing.contention if work.objective == "throughput" else 1.0
    blocks = sum(layer.kind not in ("embedding", "head") for layer in model.layers)
    windows = {layer.kind: layer.kv_window_tokens for layer in model.layers}
    each = sum(ms for _, ms in measured.get(PASS, ())[:1]) * devices / blocks
    times: dict[LayerKind, tuple[tuple[int, float], ...]] = {}
    for kind in estimate:
        share = 0.0 if kind in ("embedding", "head") else each
        guess = tuple((n, ms * slower) for n, ms in estimate[kind])
        further = _further(measured.get(attention(kind), ()), work, windows.get(kind))
        points = tuple((n, ms + share + further(n)) for n, ms in measured.get(kind, ())) or guess
        times[kind] = tuple((n, ms * stretch) for n, ms in points)
    memory = min(max(0, candidate.free_bytes), MOST_MEMORY_BYTES)
    return DeviceProfile(candidate.device, candidate.hello.name, memory, times)


def _further(points: Points, work: Workload, window: int | None) -> Callable[[int], float]:
    """Milliseconds that the tokens before add to a batch of n: of a prompt's chunks, else a step each of n sequences.

    On average half of the prompt stands before a chunk that is not its only one, and half of the answer before a step.
    """
    step_ms = next((ms for n, ms in points if n == 1), 0.0)
    chunk, chunk_ms = next(((n, ms) for n, ms in points if n > 1), (0, 0.0))
    before_step = work.prompt_tokens + work.output_tokens / 2
    before_chunk = max(0.0, work.prompt_tokens - chunk) / 2

    def added(n: int) -> float:
        before, ms = (before_chunk, chunk_ms * n / chunk) if chunk and n >= chunk else (before_step, step_ms * n)
        return ms * min(before, window or before) / FURTHER_TOKENS

    return added


def estimated(candidate: Candidate, model: ModelProfile, dtype: str) -> dict[LayerKind, tuple[tuple[int, float], ...]]:
    """Layer times of a device that did not measure them: the slower of reading the weights and of computing."""
    hello = candidate.hello
    bytes_per_ms = max(hello.gbytes_per_s.get("float32", 0.0), SLOWEST_GBYTES_PER_S) * 1e6
    flops_per_ms = max(hello.gflops.get("float32", 0.0), SLOWEST_GFLOPS) * 1e6
    times: dict[LayerKind, tuple[tuple[int, float], ...]] = {}
    for layer in model.layers:
        weights = 0 if layer.kind == "embedding" else layer.memory_bytes  # a look-up reads a row a token
        each = 2 * weights / ITEMSIZE[dtype] / flops_per_ms
        once = weights / bytes_per_ms
        times[layer.kind] = tuple((n, LAYER_OVERHEAD_MS + max(once, n * each)) for n in BATCHES)
    return times


def shown(candidate: Candidate, model: ModelProfile, dtype: str) -> dict[str, Any]:
    """A device's layer times as `status` tells them."""
    timing = candidate.timing
    times = timing.alone or estimated(candidate, model, dtype)
    alone = {kind: {str(n): round(ms, 5) for n, ms in points} for kind, points in times.items()}
    return {"alone": alone, "contention": round(timing.contention, 3), "source": timing.source}


def link_profiles(
    candidates: Mapping[DeviceId, Candidate], source: DeviceId
) -> dict[tuple[DeviceId, DeviceId], LinkProfile]:
    """Every ordered pair; an unmeasured link of two others is guessed as the slower of their links to the source."""

    def leg(a: DeviceId, b: DeviceId) -> LinkProfile:
        """A link that was measured, or one to or from the source."""
        if a in candidates and b in candidates[a].hops:
            return candidates[a].hops[b]
        other = candidates[b if a == source else a]
        rtt_ms = UNKNOWN_RTT_MS if other.rtt_ms is None else other.rtt_ms
        return LinkProfile(rtt_ms / 2 + UNKNOWN_FRAME_MS, other.mbps or UNKNOWN_MBPS)

    def way(a: DeviceId, b: DeviceId) -> LinkProfile:
        if source in (a, b) or b in candidates[a].hops:
            return leg(a, b)
        legs = leg(a, source), leg(source, b)
        return LinkProfile(max(one.latency_ms for one in legs), min(one.mbps for one in legs))

    return {(a, b): way(a, b) for a in candidates for b in candidates if a != b}
