"""Types that every folder uses: ids, profiles, workloads, plans. Frozen, checked when built, without I/O.

Layers are counted from 0. The embedding is layer 0, and the head (final norm, output matrix, sampler) is the last.
Ranges include both ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Objective = Literal["latency", "throughput"]
ScheduleName = Literal["no-bubble", "bubble", "sequential"]  # in what order sequences go through the stages
SCHEDULE_NAMES: tuple[ScheduleName, ...] = get_args(ScheduleName)
ActivationForm = Literal["exact", "int8"]  # hidden states on one link: in the compute dtype, or rounded
Activations = Literal["auto", "exact", "int8"]  # what a user asks for; auto: the planner decides for each link
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
BITS: Mapping[str, int] = {"int8": 8, "int4": 4}  # what matrices can be rounded to
STORED = "stored"  # matrices as a quantized checkpoint has them, its float matrices rounded to 8 bits
MATRIX_BITS: Mapping[str, int] = {"": 0, STORED: 8, **BITS}  # what float matrices are rounded to; 0: not at all
QUANTIZE = ("auto", "none", *BITS)  # what a user asks for; auto: int8 for 16-bit models on processors
TORCH_KERNELS = 32  # compiled matrix products that torch's oneDNN keeps, one for each shape and number of tokens
COMPUTE = re.compile(r"cpu|mps|cuda(:[0-9]{1,3})?")  # what `--compute` accepts
LayerKind = str  # "embedding", "block" (or "block:<variant>" where a model mixes kinds), "head"
DeviceId = str  # 64 hex digits: SHA-256 of the device's certificate (DER)
DeploymentId = str  # 32 hex digits, random, made by the source


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer takes in memory, and what it sends. Bytes are in the dtype that the layer is computed in."""

    name: str
    kind: LayerKind
    memory_bytes: int
    kv_bytes_per_token: int
    output_bytes_per_token: int
    tied_to: int | None = None  # the layer whose tensors this one shares if both are on one device
    kv_window_tokens: int | None = None  # a sliding window keeps at most this many tokens
    state_bytes_per_sequence: int = 0  # of recurrent layers

    def __post_init__(self) -> None:
        if min(self.memory_bytes, self.kv_bytes_per_token, self.output_bytes_per_token) < 0:
            raise ValueError(f"layer {self.name!r} has a negative size")


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model as the planner sees it: embedding, blocks, head, in order."""

    name: str
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if len(self.layers) < 3:
            raise ValueError(f"model {self.name!r} has {len(self.layers)} layers; the least is embedding, block, head")

    @property
    def memory_bytes(self) -> int:
        """Weights of the whole model on one device (a tied head costs nothing there)."""
        return sum(layer.memory_bytes for layer in self.layers if layer.tied_to is None)


@dataclass(frozen=True, slots=True)
class WorkingSpace:
    """Bytes that a device needs for a model beside weights and KV, by what they are multiplied with."""

    token: int  # for each token of a pass: hidden states, queries, feed-forward
    pair: int  # for each pair of a token of a pass and a token it attends to: attention scores, or a mask
    position: int  # for each token of a slot's room: rotation tables, one layer's keys and values in float32
    sequence: int  # for each slot: its logits
    once: int  # independent of the pass
    loading: int  # while a stage loads, before its keys and values are allocated
    window: int | None = None  # the most tokens that any layer attends to; None: all


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a device lends and how fast it is.

    `layer_ms[kind]` is a tuple of (tokens in the batch, milliseconds for one layer), rising in tokens.
    """

    device: DeviceId
    name: str
    memory_bytes: int
    layer_ms: Mapping[LayerKind, tuple[tuple[int, float], ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """An ordered pair of devices: a hop costs latency_ms + bytes·8/(mbps·1000) ms."""

    latency_ms: float
    mbps: float

    def __post_init__(self) -> None:
        if self.latency_ms < 0 or self.mbps <= 0:
            raise ValueError(f"impossible link: {self.latency_ms} ms, {self.mbps} Mbps")


@dataclass(frozen=True, slots=True)
class Medium:
    """Links, as ordered pairs, that share one radio: only one of them carries bytes at a time."""

    name: str
    links: frozenset[tuple[DeviceId, DeviceId]]


@dataclass(frozen=True, slots=True)
class Workload:
    """What the deployment is expected to serve. `context` is the most tokens one slot holds."""

    prompt_tokens: int = 128
    output_tokens: int = 128
    sequences: int = 4
    context: int = 2048
    objective: Objective = "latency"
    prompt_chunk: int | None = None  # the most tokens of a prompt in one piece; None: the prompt travels whole

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.output_tokens, self.sequences, self.context, self.prompt_chunk or 1) < 1:
            raise ValueError(f"every number of a workload is at least 1: {self}")

    @property
    def pieces(self) -> tuple[int, ...]:
        """The prompt's tokens as they travel: whole, or in chunks of which the last may be shorter."""
        return pieces_of(self.prompt_tokens, self.prompt_chunk or self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers first..last (both included) on one device."""

    device: DeviceId
    first_layer: int
    last_layer: int

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer <= self.last_layer:
            raise ValueError(f"a stage's range must rise: {self.first_layer}..{self.last_layer}")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the cost model says of a plan. `tokens_per_second` is one request's rate (latency) or that of all."""

    time_to_first_token_ms: float
    step_ms: float
    request_ms: float
    tokens_per_second: float
    micro_batch: int = 1
    micro_batches: int = 1
    bottleneck: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages in order. They cover every layer once; neighbours on one device are merged."""

    stages: tuple[Stage, ...]
    predicted: Prediction
    optimal: bool = False
    bound: float = 0.0  # no plan is better than this: request_ms, or tokens per second for throughput

    def __post_init__(self) -> None:
        expected = 0
        for stage in self.stages:
            if stage.first_layer != expected:
                raise ValueError(f"plan leaves a gap before layer {stage.first_layer}, expected {expected}")
            expected = stage.last_layer + 1
        if not self.stages or len(self.stages) > MAX_STAGES:
            raise ValueError(f"a plan has 1 to {MAX_STAGES} stages, not {len(self.stages)}")

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """The devices in the order of their first stages."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))


def batches_of(sequences: int, micro_batch: int, micro_batches: int) -> int:
    """The number of even micro-batches for so many sequences.

    It is the plan's `micro_batches`, but fewer if some would be empty, and more if some would exceed `micro_batch`.
    """
    return max(min(sequences, micro_batches), -(-sequences // micro_batch))


Pooling = Literal["mean", "last"]  # how a prompt's hidden states become one vector
Cuts = tuple[tuple[int, int], ...]  # (least new prompt tokens, tokens of a chunk), rising; the first is for 1
MAX_CUTS = 64


def chunk_of(cuts: Cuts, tokens: int) -> int:
    """The size of the chunks in which a prompt of so many tokens travels."""
    return next(chunk for least, chunk in reversed(cuts) if least <= tokens)


def pieces_of(tokens: int, chunk: int) -> tuple[int, ...]:
    """The sizes of a prompt's chunks; the last may be smaller."""
    whole, rest = divmod(tokens, chunk)
    return (chunk,) * whole + ((rest,) if rest else ())


MAX_STAGES = 1024  # a plan is a control message; its size is bounded


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the head picks a token. temperature 0 is greedy. Penalties count the answer's own tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # random numbers are a function of (seed, position)

    def __post_init__(self) -> None:
        for name, low, high in SAMPLING_LIMITS:
            value = getattr(self, name)
            if not low <= value <= high:  # NaN fails too
                raise ValueError(f"{name} must lie in [{low}, {high}], not {value}")


SAMPLING_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 2**31 - 1),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -100.0, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("seed", 0, 2**63 - 1),
)
