"""What a daemon and its engine say to each other. No torch here: the daemon imports this file.

Requests carry `request`, a number the daemon chose; the engine answers each with exactly one message of that number
(`Failed` when it could not), and may send events in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peerllm.types import (
    ActivationForm,
    Cuts,
    DeploymentId,
    DeviceId,
    LayerKind,
    ModelProfile,
    Sampling,
    ScheduleName,
    WorkingSpace,
)

PASS: LayerKind = "pass"  # noqa: S105  # in a device's layer times: what a batch costs at a stage beside its layers
FURTHER_TOKENS = 1024
FinishReason = Literal["stop", "length", "cancelled", "error"]
SpanName = Literal[
    "idle", "take in", "pass", "hand on", "another model",  # of the compute thread, one after the other
    "serialise", "enqueue",  # of the compute thread, within the others
    "send", "receive", "held back",  # of a link
]  # fmt: skip
SpanKind = Literal["", "step", "prompt", "activation", "token", "release", "open"]


def attention(kind: LayerKind) -> LayerKind:
    """Under which name layer times tell what a block's attention to FURTHER_TOKENS more costs."""
    return f"attention:{kind}"


@dataclass(frozen=True, slots=True)
class TensorAt:
    """One checkpoint tensor and where its bytes lie: `path` is a file of this device, `offset` from its start."""

    name: str
    dtype: str  # as in the safetensors header: "F32", "BF16", "F16", ...
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Trusted:
    """A device of the household, for the data plane's TLS."""

    device: DeviceId
    certificate_pem: str


# ---- daemon to engine -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Configure:
    """First message. `port` 0 takes a free one; `hosts` are the addresses to listen on."""

    request: int
    device: DeviceId
    certificate_path: str
    key_path: str
    hosts: tuple[str, ...]
    port: int
    threads: int
    trusted: tuple[Trusted, ...]
    compute: str = "cpu"  # or an accelerator; see engine/kernels/accelerator.py


@dataclass(frozen=True, slots=True)
class Trust:
    """The roster changed: links of devices no longer listed are cut at once."""

    trusted: tuple[Trusted, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure this device's arithmetic and memory."""

    request: int


@dataclass(frozen=True, slots=True)
class TimeLayers:
    """Time each kind of layer of a model, made up from its configuration, while nothing else is computed here."""

    request: int
    config: str  # config.json's text
    dtype: str
    limit_bytes: int  # the most it may take
    quantize: str = ""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Read config.json and the safetensors headers of a directory; no weights are read."""

    request: int
    model_dir: str
    dtype: str  # "float32", "bfloat16", "float16", or "auto": what the files hold
    quantize: str = "none"  # one of types.QUANTIZE


@dataclass(frozen=True, slots=True)
class Hop:
    """The next stage's engine: where the link goes."""

    device: DeviceId
    hosts: tuple[str, ...]
    port: int
    stage: int  # index in the plan; len(stages) stands for the way back to the source


@dataclass(frozen=True, slots=True)
class LoadStage:
    """Load layers first..last as a stage of a deployment's epoch, with KV room for `slots` × `context` tokens."""

    request: int
    deployment: DeploymentId
    epoch: int
    stage: int
    stages: int  # how many the plan has
    first_layer: int
    last_layer: int
    config: str  # config.json's text
    tensors: tuple[TensorAt, ...]
    dtype: str
    slots: int
    context: int
    chunk: int  # tokens of prompts that travel in one frame, at most
    micro_batch: int  # sequences in one frame, at most
    upstream: DeviceId | None  # who may send to this stage; None: it is the source's first
    downstream: Hop | None  # None: the next stage (or the return) is on this device
    head_device: DeviceId  # who may send tokens back to the source
    limit_bytes: int | None = None  # the most its weights and KV may take; checked before any is taken
    quantize: str = ""  # "int8", "int4": what its matrices are rounded to
    micro_batches: int = 1  # of the plan: into so many the source divides the sequences that decode, if they are enough
    schedule: ScheduleName = "no-bubble"  # the source's
    cuts: Cuts = ()  # the source's: how it cuts a prompt, by the tokens of it that are new; (): always `chunk`
    upstream_activations: ActivationForm = "exact"  # how hidden states come in ...
    downstream_activations: ActivationForm = "exact"  # ... and go out


@dataclass(frozen=True, slots=True)
class Connect:
    """Every stage is loaded: dial `downstream` for each stage of this device."""

    request: int
    deployment: DeploymentId
    epoch: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Free all of a deployment on this device; its running sequences end with reason "error"."""

    request: int
    deployment: DeploymentId


@dataclass(frozen=True, slots=True)
class Submit:
    """On the source: start a sequence. A slot must be free (the daemon counts them)."""

    deployment: DeploymentId
    sequence: int
    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling
    client: str = ""  # whose it is: what a slot holds of an earlier sequence is taken up for the same client only


@dataclass(frozen=True, slots=True)
class Cancel:
    """On the source: end a sequence and free its slot on every stage."""

    deployment: DeploymentId
    sequence: int


@dataclass(frozen=True, slots=True)
class TimeLink:
    """Time frames of these sizes to another device's engine, one at a time."""

    request: int
    device: DeviceId
    hosts: tuple[str, ...]
    port: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Record what is done for a deployment, beginning anew; or end that and say what was done, part by part.

    "clock" does nothing: every answer says what the clock shows here.
    """

    request: int
    deployment: DeploymentId
    want: Literal["clock", "start", "take"]


@dataclass(frozen=True, slots=True)
class QueryLoad:
    """Ask for `EngineLoad` (tests, status)."""

    request: int


# ---- engine to daemon -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Facts:
    """What a daemon wants to know of its engine."""

    runtime_bytes: int  # resident size of the engine with its libraries loaded and nothing else
    versions: Mapping[str, str]  # library: version
    architectures: tuple[str, ...]  # model types it can divide
    dtypes: tuple[str, ...]
    place: str = "cpu"  # where it computes
    memory_bytes: int = 0  # of that place's own; 0: it is the machine's
    free_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured(Facts):
    request: int
    port: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What a matrix-vector and a matrix-matrix product reach, by dtype: there is "float32"."""

    request: int
    gbytes_per_s: Mapping[str, float]
    gflops: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LayersTimed:
    """By layer kind, (tokens in a batch, milliseconds of one layer), rising in tokens (engine/measure/layer_times.py).

    The kind PASS is what a batch costs at a stage, however few its layers; the others are net of it and of what
    attention to the tokens before costs: `attention(kind)` is what FURTHER_TOKENS of them add to a step of one sequence
    (1 token) and to a chunk of a prompt.
    """

    request: int
    layer_ms: Mapping[LayerKind, tuple[tuple[int, float], ...]]
    skipped: Mapping[LayerKind, str]  # kind: why it was not timed


@dataclass(frozen=True, slots=True)
class Inspected:
    request: int
    profile: ModelProfile
    architecture: str
    config: str
    dtype: str  # the compute dtype that "auto" stands for
    hidden_size: int
    vocabulary: int
    max_context: int
    stop_ids: tuple[int, ...]
    tensors: tuple[tuple[TensorAt, ...], ...]  # per layer, every tensor it owns (a tied one stands in both)
    working: WorkingSpace
    quantize: str = ""

    @property
    def exact(self) -> bool:
        """In float32 and with weights as they are: nothing of it is ever rounded."""
        return self.dtype == "float32" and not self.quantize


@dataclass(frozen=True, slots=True)
class LoadProgress:
    deployment: DeploymentId
    stage: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    request: int


@dataclass(frozen=True, slots=True)
class Failed:
    """`kind` is the PeerLLMError class's name."""

    request: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """New token ids of a sequence, in order; `start` counts from 0 at the answer's first token."""

    deployment: DeploymentId
    sequence: int
    start: int
    ids: tuple[int, ...]
    finish: FinishReason | None = None
    error: str = ""
    reused: int = 0  # where `start` is 0: tokens of the prompt that a slot held already


@dataclass(frozen=True, slots=True)
class LinkLost:
    """A data link of a deployment broke (peer died, or sent what it may not)."""

    deployment: DeploymentId
    device: DeviceId
    reason: str


@dataclass(frozen=True, slots=True)
class LinkTimed:
    """(bytes, seconds) of the frames that TimeLink asked for, each up to its arrival at the other engine."""

    request: int
    frames: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class LinkTraffic:
    """How long some frames of running sequences took (device, bytes, seconds), at most a few a second.

    `handover_s`: from an event's arrival here until the compute thread has it, where that had nothing to do.
    """

    frames: tuple[tuple[DeviceId, int, float], ...]
    handover_s: float | None


@dataclass(frozen=True, slots=True)
class Span:
    """Something this engine did or waited for. What a frame carried, a token's id above all, is not in it."""

    name: SpanName
    start_ns: int  # of perf_counter_ns in the engine's process
    end_ns: int
    kind: SpanKind = ""  # of a pass or of a frame
    stage: int = -1  # of a pass; or whom a frame is for
    device: DeviceId = ""  # at the other end of the link
    frame: int = 0  # its number on its connection, from 1
    nbytes: int = 0
    queued_ns: int = 0  # of "send": from its being bytes until the link took it up
    # sequence, position, tokens and whether (1) the head draws a token after them
    pieces: tuple[tuple[int, int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Recorded:
    """Answers Record: `spans` in the order in which they ended, `left` more to take, `lost` by the ring's bound."""

    request: int
    clock_ns: int
    spans: tuple[Span, ...] = ()
    left: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine holds now: (deployment, stage, slots in use), weights and KV bytes; for status and tests."""

    request: int
    stages: tuple[tuple[DeploymentId, int, int], ...]
    weight_bytes: int
    kv_bytes: int
    resident_bytes: int
    measured: Mapping[str, float] = field(default_factory=dict)  # "<deployment>/<stage>": mean ms of a batch of steps
    # ... and by its sequences: (sequences, ms, standard deviation as a share of that), rising
    paces: Mapping[str, tuple[tuple[int, float, float], ...]] = field(default_factory=dict)
    held_bytes: Mapping[DeploymentId, int] = field(default_factory=dict)  # weights and KV, by deployment


ToEngine = (
    Configure | Trust | Measure | TimeLayers | Inspect | LoadStage | Connect | Unload | Submit | Cancel | TimeLink
    | Record | QueryLoad
)
FromEngine = (
    Configured | Measured | LayersTimed | Inspected | LoadProgress | Done | Failed | Tokens | LinkLost | LinkTimed
    | LinkTraffic | Recorded | EngineLoad
)
