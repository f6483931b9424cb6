"""The messages between a daemon and its engine. This file must not import torch, since the daemon imports it.

Requests carry `request`, a number that the daemon chose. The engine answers each with exactly one message of that
number (`Failed` if the request failed), and may send events in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peerllm.types import (
    ActivationForm,
    Cuts,
    DeploymentId,
    DeviceId,
    LayerKind,
    ModelProfile,
    Pooling,
    Sampling,
    ScheduleName,
    WorkingSpace,
)

PASS: LayerKind = "pass"  # noqa: S105  # in layer times: what a batch costs at a stage beside its layers
FURTHER_TOKENS = 1024
# What a grammar may take, as llguidance counts: of memory some 40 MB, of time some milliseconds a token.
GRAMMAR_LIMITS: Mapping[str, Any] = {
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "verbose_errors": False,  # errors name no parts of the answer
}
WORKING_STEPS = 16  # more than are computed of answers that end an engine again each time they go on
FinishReason = Literal["stop", "length", "cancelled", "error"]
SpanName = Literal[
    "idle", "take in", "pass", "hand on", "another model",  # of the compute thread, consecutive
    "serialise",  # of the compute thread, inside those
    "send", "receive",  # of a link
]  # fmt: skip
SpanKind = Literal["", "step", "prompt", "activation", "token", "release", "open", "mask"]


def attention(kind: LayerKind) -> LayerKind:
    """Under which name layer times tell what a block's attention to FURTHER_TOKENS more costs."""
    return f"attention:{kind}"


@dataclass(frozen=True, slots=True)
class TensorAt:
    """One checkpoint tensor and the place of its bytes: `offset` in the file `path` of this device."""

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
    """The first message. `hosts` are the addresses to listen on; `port` 0 takes a free port."""

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
    """The roster changed: cut the links of devices that are no longer listed."""

    trusted: tuple[Trusted, ...]


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure this device's arithmetic and memory speed."""

    request: int


@dataclass(frozen=True, slots=True)
class TimeLayers:
    """Time each kind of layer of a model, with made-up weights, while nothing else is computed here."""

    request: int
    config: str  # config.json's text
    dtype: str
    limit_bytes: int  # the most memory that this may use
    quantize: str = ""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Read config.json and the safetensors headers of a directory, but no weights."""

    request: int
    model_dir: str
    dtype: str  # "float32", "bfloat16", "float16", or "auto": what the files hold
    quantize: str = "none"  # one of types.QUANTIZE


@dataclass(frozen=True, slots=True)
class Hop:
    """Where a stage's outgoing link leads: the engine of the next stage."""

    device: DeviceId
    hosts: tuple[str, ...]
    port: int
    stage: int  # its index in the plan; the number of stages stands for the way back to the source


@dataclass(frozen=True, slots=True)
class LoadStage:
    """Load layers first..last as a stage of a deployment's epoch, with KV room for `slots` × `context` tokens."""

    request: int
    deployment: DeploymentId
    epoch: int
    stage: int
    stages: int  # number of stages in the plan
    first_layer: int
    last_layer: int
    config: str  # config.json's text
    tensors: tuple[TensorAt, ...]
    dtype: str
    slots: int
    context: int
    chunk: int  # the most prompt tokens in one frame
    micro_batch: int  # the most sequences in one frame
    upstream: DeviceId | None  # the device that may send to this stage; None: the first stage
    downstream: Hop | None  # None: the next stage (or the return) is on this device
    head_device: DeviceId  # the device that may send tokens back to the source
    limit_bytes: int | None = None  # the most memory for weights and KV; checked before any is allocated
    added_limit_bytes: int | None = None  # the same of what comes to the shards of the deployment that are loaded
    quantize: str = ""  # a key of types.MATRIX_BITS: what matrices are rounded to
    micro_batches: int = 1  # for the source: the most batches into which it divides decoding sequences
    schedule: ScheduleName = "no-bubble"  # for the source
    cuts: Cuts = ()  # for the source: how it cuts prompts, by their number of new tokens; (): always `chunk`
    upstream_activations: ActivationForm = "exact"  # the form of incoming hidden states
    downstream_activations: ActivationForm = "exact"  # the form of outgoing hidden states
    state_from: tuple[DeviceId, ...] = ()  # who may bring what sequences keep in the layers that are loaded anew


@dataclass(frozen=True, slots=True)
class Connect:
    """Every stage is loaded: dial `downstream` for each stage of this device."""

    request: int
    deployment: DeploymentId
    epoch: int


@dataclass(frozen=True, slots=True)
class Switch:
    """On the source: from now on sequences run in this epoch, whose links stand; running ones change between two steps.

    Answered with Done when no sequence runs in an earlier epoch any more. Sequences whose keys and values a stage of
    the new epoch lacks are computed again from their token ids, through the last layer that lacks them.
    """

    request: int
    deployment: DeploymentId
    epoch: int


@dataclass(frozen=True, slots=True)
class CarryState:
    """On a device that holds layers first..last in `epoch`: copy what they keep of every sequence to another device.

    That one has loaded the layers for `to_epoch`. Decoding goes on meanwhile. Answered with Done when what stood at the
    beginning has arrived; what was computed since is computed again there after the switch.
    """

    request: int
    deployment: DeploymentId
    epoch: int
    first_layer: int
    last_layer: int
    to_epoch: int
    to: Hop  # the stage of `to_epoch` that holds these layers


@dataclass(frozen=True, slots=True)
class Unload:
    """End a deployment's epochs up to `epoch` on this device (None: all) and free the shards that no later epoch uses.

    The last epoch's running sequences end with reason "error". `only`: earlier epochs stand, and keep their shards.
    """

    request: int
    deployment: DeploymentId
    epoch: int | None = None
    only: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer's text must be: a grammar of llguidance's over the tokens of a tokenizer.json on this device."""

    grammar: str
    tokenizer: str  # its path


@dataclass(frozen=True, slots=True)
class Submit:
    """On the source: start a sequence. A slot must be free (the daemon counts them)."""

    deployment: DeploymentId
    sequence: int
    prompt: tuple[int, ...]
    max_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling
    client: str = ""  # only sequences of the same client may reuse what a slot keeps
    answer: tuple[int, ...] = ()  # ids of the answer that are known already: it goes on after them
    constraint: Constraint | None = None
    pool: Pooling | None = None  # there is no answer: the prompt's hidden states become one vector
    logprobs: int | None = None  # with each token come its log probability and those of so many likeliest ones


@dataclass(frozen=True, slots=True)
class Cancel:
    """On the source: end a sequence and free its slot on every stage."""

    deployment: DeploymentId
    sequence: int


@dataclass(frozen=True, slots=True)
class TimeLink:
    """Send frames of these sizes to another device's engine, one at a time, and time them."""

    request: int
    device: DeviceId
    hosts: tuple[str, ...]
    port: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Start a new recording of a deployment ("start"), or end it and return it in parts ("take").

    "clock" does nothing else than every answer does: tell this engine's clock.
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
    """What an engine tells its daemon about itself."""

    runtime_bytes: int  # resident size of the engine with nothing but its libraries loaded
    versions: Mapping[str, str]  # library: version
    architectures: tuple[str, ...]  # model types it can divide
    dtypes: tuple[str, ...]
    place: str = "cpu"  # the device that it computes on
    memory_bytes: int = 0  # that device's own memory; 0: it uses the machine's
    free_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured(Facts):
    request: int
    port: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The speed of matrix-vector and matrix-matrix products by dtype (always with "float32")."""

    request: int
    gbytes_per_s: Mapping[str, float]
    gflops: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LayersTimed:
    """For each layer kind (tokens in a batch, milliseconds of one layer), rising in tokens; see measure/layer_times.py.

    The kind PASS is what a batch costs at a stage whatever its layers; the other kinds exclude that, and what attention
    to the tokens before costs: `attention(kind)` is what FURTHER_TOKENS of them add to a step of one sequence (1 token)
    and to a chunk of a prompt.
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
    tensors: tuple[tuple[TensorAt, ...], ...]  # for each layer its tensors (a tied one belongs to two layers)
    working: WorkingSpace
    quantize: str = ""
    mixed_rows: bool = False  # what travels between stages is more than hidden states, whose sizes differ

    @property
    def exact(self) -> bool:
        """Whether nothing is ever rounded: computed in float32, with unrounded weights."""
        return self.dtype == "float32" and not self.quantize

    @property
    def exact_rows(self) -> bool:
        """Whether what travels between stages must not be rounded."""
        return self.exact or self.mixed_rows


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
    """A request failed; `kind` is the name of the PeerLLMError class."""

    request: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """New token ids of a sequence, in order; `start` is the index of the first one in the answer."""

    deployment: DeploymentId
    sequence: int
    start: int
    ids: tuple[int, ...]
    finish: FinishReason | None = None
    error: str = ""
    reused: int = 0  # only with `start` 0: how many tokens of the prompt the slot held already
    vector: tuple[float, ...] = ()  # what was asked for in place of tokens, float32; ends the sequence
    logprobs: tuple[bytes, ...] = ()  # of each id, if they were asked for; see logprobs.unpacked


@dataclass(frozen=True, slots=True)
class LinkLost:
    """A data link of a deployment broke: the peer died or sent something not allowed."""

    deployment: DeploymentId
    device: DeviceId
    reason: str
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class LinkTimed:
    """(bytes, seconds until arrival at the other engine) of the frames that TimeLink asked for."""

    request: int
    frames: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class LinkTraffic:
    """How long some frames of running sequences took (device, bytes, seconds), at most a few a second.

    `handover_s`: from an event's arrival until a compute thread without work has it.
    """

    frames: tuple[tuple[DeviceId, int, float], ...]
    handover_s: float | None


@dataclass(frozen=True, slots=True)
class Span:
    """Something that this engine did or waited for. It has no token ids and nothing else that a frame carried."""

    name: SpanName
    start_ns: int  # of perf_counter_ns in the engine's process
    end_ns: int
    kind: SpanKind = ""  # of passes and frames
    stage: int = -1  # of a pass, or the stage that a frame is for
    device: DeviceId = ""  # at the other end of the link
    frame: int = 0  # the frame's number on its connection, from 1
    nbytes: int = 0
    queued_ns: int = 0  # of "send": time from encoding until the link began to send
    # sequence, position, tokens, and 1 if the head draws a token after them
    pieces: tuple[tuple[int, int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Recorded:
    """Answers Record: `spans` in the order in which they ended; `left` more can be taken; the ring dropped `lost`."""

    request: int
    clock_ns: int
    spans: tuple[Span, ...] = ()
    left: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine holds now: (deployment, stage, slots in use), bytes of weights and KV; for status and tests."""

    request: int
    stages: tuple[tuple[DeploymentId, int, int], ...]
    weight_bytes: int
    kv_bytes: int
    resident_bytes: int
    measured: Mapping[str, float] = field(default_factory=dict)  # "<deployment>/<stage>": mean ms of a batch of steps
    # ... by sequences in the batch, rising: (sequences, mean ms, standard deviation as a share of the mean)
    paces: Mapping[str, tuple[tuple[int, float, float], ...]] = field(default_factory=dict)
    held_bytes: Mapping[DeploymentId, int] = field(default_factory=dict)  # weights and KV, by deployment
    replayed_tokens: int = 0  # that the stages here computed again, since the engine started
    dropped_frames: int = 0  # runs and tokens that came late, twice or for nobody
    loaded_layers: int = 0  # since the engine started


@dataclass(frozen=True, slots=True)
class Working:
    """The engine has computed WORKING_STEPS batches of steps, told once: what ends it now is no fault of its start."""


ToEngine = (
    Configure
    | Trust
    | Measure
    | TimeLayers
    | Inspect
    | LoadStage
    | Connect
    | Switch
    | CarryState
    | Unload
    | Submit
    | Cancel
    | TimeLink
    | Record
    | QueryLoad
)
FromEngine = (
    Configured
    | Measured
    | LayersTimed
    | Inspected
    | LoadProgress
    | Done
    | Failed
    | Tokens
    | LinkLost
    | LinkTimed
    | LinkTraffic
    | Recorded
    | EngineLoad
    | Working
)
