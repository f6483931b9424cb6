"""Control messages between the daemons of a household, over one authenticated websocket per pair of devices.

`Ask` wraps a request that wants exactly one `Answer` of the same number; everything else is told and forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from peerllm.daemon.decide.succession.succession_events import CoordinatedPlan
from peerllm.engine.messages import Recorded
from peerllm.transport.roster.entry import RosterEntry
from peerllm.types import (
    ActivationForm,
    Activations,
    Cuts,
    DeploymentId,
    DeviceId,
    LayerKind,
    Sampling,
    ScheduleName,
    Stage,
)

DeploymentState = Literal["planning", "loading", "serving", "waiting", "failed", "stopped"]
MAX_TIME_S = 253_402_214_400  # unix seconds that a calendar has: the last day of the year 9999
MAX_COUNT = 1 << 53  # of bytes, tokens, parameters: sums of some are still numbers that JSON has
MAX_MODEL_CHARS = 4096  # of a name or path


def _within(most: int, *numbers: int) -> None:
    """Else lists of models could not be told; ValueError."""
    if not all(0 <= one <= most for one in numbers):
        raise ValueError(f"a number is not from 0 to {most}")


@dataclass(frozen=True, slots=True)
class Hello:
    """First message both ways: who I am, what I lend, what I can compute."""

    protocol: int
    version: str
    libraries: Mapping[str, str]
    name: str
    control_port: int
    data_port: int
    memory_bytes: int  # what the machine has
    lent_bytes: int  # what its owner offers
    gbytes_per_s: Mapping[str, float]
    gflops: Mapping[str, float]
    architectures: tuple[str, ...]
    dtypes: tuple[str, ...]
    machine: str = ""  # the same on devices that share a machine; "": unknown
    place: str = "cpu"  # where it computes: an accelerator has its name here
    threads: int = 1  # it computes with
    processors: int = 1  # that the machine has


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Every HEARTBEAT_S; the other side echoes it at once, which also measures the round trip."""

    number: int
    echo: bool = False


@dataclass(frozen=True, slots=True)
class HeartbeatKey:
    """The sender's half of the key with which the two devices make heartbeats in datagrams (64 hex digits)."""

    half: str


@dataclass(frozen=True, slots=True)
class Goodbye:
    reason: str


@dataclass(frozen=True, slots=True)
class Gossip:
    """The sender's whole roster, live members and tombstones."""

    entries: tuple[RosterEntry, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the sender reaches a device of the household."""

    device: DeviceId
    hosts: tuple[str, ...]
    control_port: int


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Addresses worth trying where mDNS does not pass. Hints only: TLS says who is there."""

    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """A deployment as its coordinator tells it to everyone, for `status` on any device. No text, no token ids."""

    deployment: DeploymentId
    model: str
    state: DeploymentState
    epoch: int
    coordinator: DeviceId
    stages: tuple[Stage, ...]
    stage_memory_bytes: tuple[int, ...]
    predicted: Mapping[str, float | str] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    progress: float = 0.0  # 0 to 1, of a download or of loading
    schedule: ScheduleName = "no-bubble"
    activations: tuple[ActivationForm, ...] = ()  # how hidden states go from each stage to the next
    activations_wanted: Activations = "auto"
    dtype: str = ""  # it is computed in; "": not known yet
    quantize: str = ""  # a key of types.MATRIX_BITS: what weights are rounded to; "": not at all
    quantize_wanted: str = "auto"  # one of types.QUANTIZE
    name: str = ""  # what people and clients call it
    context: int = 0  # tokens that a sequence may hold, as planned; 0: there is no plan
    slots: int = 0  # sequences served at once, as planned
    message: str = ""  # what is being done until it serves, for people
    form: str = ""  # the quantisation of its GGUF files, as they are called
    created: int = 0  # unix seconds
    missing_bytes: int = 0  # memory that the household lacks for it; 0: none, or it is not known
    succeeds: DeploymentId = ""  # the deployment that this one was begun anew for
    stays: bool = False  # its coordinator gives way to no other that goes on with the same
    expires: int = 0  # unix seconds at which it is unloaded if nobody asks for it; 0: never
    abilities: tuple[str, ...] = ()  # of the model, see chat_templates
    idle_since: int = 0  # unix seconds, where it makes room for others; 0: it is used, or a person's
    on_demand: bool = False  # a request started it, and no person
    family: str = ""  # the model's architecture; "": not known yet
    parameters: int = 0  # about; 0: not known yet

    def __post_init__(self) -> None:
        _within(MAX_MODEL_CHARS, len(self.name), len(self.model))
        _within(MAX_TIME_S, self.created, self.expires, self.idle_since)
        _within(MAX_COUNT, *self.stage_memory_bytes, self.missing_bytes, self.parameters, self.context)


@dataclass(frozen=True, slots=True)
class DiskModel:
    """A model whose files a device has, so that it can be started there; `made`: unix seconds.

    `alias`: no files, but another name for a model of the household. `asleep`: a person ran it there, in a way that the
    device remembers.
    """

    name: str
    model: str  # as `run` is told it
    nbytes: int
    made: int
    alias: bool = False
    asleep: bool = False
    abilities: tuple[str, ...] = ()  # besides going on with a text, see chat_templates

    def __post_init__(self) -> None:
        _within(MAX_MODEL_CHARS, len(self.name), len(self.model))
        _within(MAX_COUNT, self.nbytes)
        _within(MAX_TIME_S, self.made)


@dataclass(frozen=True, slots=True)
class Holding:
    """A shard, layers first..last of a deployment, that a device has loaded, and the last epoch that uses it.

    A later epoch uses it again if it has room for as many `slots` of as much `context`.
    """

    deployment: DeploymentId
    epoch: int
    first_layer: int
    last_layer: int
    slots: int = 0
    context: int = 0


@dataclass(frozen=True, slots=True)
class DeviceView:
    """What a device says of itself now; `promised_bytes` is what its ledger has given out of `lent_bytes`."""

    promised_bytes: int
    resident_bytes: int  # of the engine's process, as measured; 0 while there is none
    engine: str  # EngineHost.state
    deployments: tuple[DeploymentView, ...]  # those it coordinates
    used_bytes: int = 0  # what is promised to deployments, and the engine's own size while it runs
    holdings: tuple[Holding, ...] = ()
    leaving: str = ""  # why it asks to hold nothing any more (going down, paused, on battery); "": it does not
    obeyed: Mapping[DeploymentId, DeviceId] = field(default_factory=dict)  # whom, where it is of another's plan
    on_disk: tuple[DiskModel, ...] = ()


@dataclass(frozen=True, slots=True)
class LinkSeen:
    """What the sender measured of its link with `device`; None: not measured. Ages are in seconds, when it was sent.

    `hop_ms` and `frame_mbps` are of frames to that device's engine, `mbps` of downloads from that device.
    """

    device: DeviceId
    rtt_ms: float | None = None
    mbps: float | None = None
    mbps_age_s: float = 0.0
    mbps_from_traffic: bool = False  # refined by what downloads took
    hop_ms: float | None = None
    frame_mbps: float | None = None
    hop_age_s: float = 0.0
    hop_from_traffic: bool = False  # refined by what a request's frames took


@dataclass(frozen=True, slots=True)
class LinkTable:
    """All that the sender measured of its own links; replaces what it said before."""

    links: tuple[LinkSeen, ...]
    handover_ms: float | None = None  # from a frame's arrival until the sender's compute thread has it


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of a repository on the Hugging Face hub at one commit; its address is each device's own setting."""

    model: str  # owner/name
    commit: str  # 40 hex digits
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """One tensor of the manifest: what its bytes must hash to, and where the hub has them.

    `sha256` is "" for a tensor that nobody has fetched from the hub yet, and for one that lies on the source itself.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sha256: str
    file: int = -1  # which of Assign.hub's files holds it; -1: only devices have it
    offset: int = 0  # in that file
    fetcher: DeviceId = ""  # who gets it from the source or the hub, for all; "": whoever needs it


@dataclass(frozen=True, slots=True)
class StageWork:
    """One stage a device shall take over, complete but for the weights, which it fetches from whoever has them."""

    stage: int
    first_layer: int
    last_layer: int
    tensors: tuple[TensorDigest, ...]
    upstream: DeviceId | None
    downstream: DeviceId | None
    downstream_stage: int
    downstream_hosts: tuple[str, ...] = ()  # where the coordinator reaches it, for devices that have not met
    downstream_port: int = 0  # of its data plane
    upstream_activations: ActivationForm = "exact"  # how hidden states come from there ...
    downstream_activations: ActivationForm = "exact"  # ... and go there
    state_from: tuple[DeviceId, ...] = ()  # who had some of its layers, and may bring what sequences keep in them


# ---- what an Ask may carry, and what answers it -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserve:
    """Promise `nbytes` to this deployment's epoch for `lease_s`; committed by Assign, else it lapses.

    While earlier epochs of the deployment stand, only `added_bytes` come on top of what they were promised (None: all):
    the shards that both use are in memory once.
    """

    deployment: DeploymentId
    epoch: int
    nbytes: int
    lease_s: float
    added_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Assign:
    """Commit the reservation: fetch the tensors, load the stages. Answered when loaded."""

    deployment: DeploymentId
    epoch: int
    model: str
    config: str
    dtype: str
    slots: int
    context: int
    chunk: int
    micro_batch: int
    micro_batches: int
    schedule: ScheduleName
    stages: int
    work: tuple[StageWork, ...]
    head_device: DeviceId
    quantize: str = ""
    cuts: Cuts = ()  # as in LoadStage
    hub: HubFiles | None = None  # where tensors come from that no device has


@dataclass(frozen=True, slots=True)
class Activate:
    """All stages are loaded: dial the next stage's engine."""

    deployment: DeploymentId
    epoch: int


@dataclass(frozen=True, slots=True)
class Carry:
    """Copy what layers first..last keep of the running sequences to the device that takes them over (CarryState)."""

    deployment: DeploymentId
    epoch: int
    first_layer: int
    last_layer: int
    to_epoch: int
    to_stage: int
    to_device: DeviceId
    to_hosts: tuple[str, ...]
    to_port: int


@dataclass(frozen=True, slots=True)
class Release:
    """Let go of a deployment (all its epochs up to `epoch`); what a later epoch uses stays.

    `only`: earlier epochs stand, and what they use stays too.
    """

    deployment: DeploymentId
    epoch: int
    only: bool = False


@dataclass(frozen=True, slots=True)
class Profile:
    """Say how long each kind of layer takes here; with `measure` that is found out if it is not known from before."""

    config: str
    dtype: str
    kinds: tuple[LayerKind, ...]
    measure: bool
    quantize: str = ""


@dataclass(frozen=True, slots=True)
class Pace:
    """Say how long the passes of this deployment's stages take here now."""

    deployment: DeploymentId


@dataclass(frozen=True, slots=True)
class Trace:
    """Record what the stages of this deployment do here, or end that and say it, part by part.

    Every answer, and that to "clock" does nothing else, says what the engine's clock shows.
    """

    deployment: DeploymentId
    want: Literal["clock", "start", "take"]


@dataclass(frozen=True, slots=True)
class Have:
    """Say which of these tensors can be fetched from you.

    Each key is a SHA-256, or the key of a tensor's place on the hub (`hub_key`) while its SHA-256 is not known.
    """

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inherit:
    """A device of the plan asks its coordinator for what only that one has, so as to follow it.

    The answer names files by SHA-256, to be fetched like weights. `complete`: the device has all of it now.
    """

    deployment: DeploymentId
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Vote:
    """Obey me in this deployment, whose coordinator is lost: the answer is the vote (decide/succession/)."""

    plan: CoordinatedPlan
    term: int


@dataclass(frozen=True, slots=True)
class MakeWay:
    """Unload a deployment that you coordinate, if a request started it and nobody uses it: another needs its memory."""

    deployment: DeploymentId


LoadQuestion = Reserve | Assign | Activate | Carry | Release | Profile | Pace | Trace  # of what a device loads
Question = LoadQuestion | Have | Inherit | Vote | MakeWay


@dataclass(frozen=True, slots=True)
class Ask:
    number: int
    body: Question


@dataclass(frozen=True, slots=True)
class Answer:
    """`error` is the PeerLLMError class's name, "" when all went well; `free_bytes`: what could still be lent."""

    number: int
    error: str = ""
    reason: str = ""
    free_bytes: int = 0
    layer_ms: Mapping[LayerKind, tuple[tuple[int, float], ...]] = field(default_factory=dict)  # of a Profile
    cached: bool = False  # ... known from before
    stage_ms: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)  # of a Pace, by stage number
    stage_spread: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)  # ... share of those
    recorded: Recorded | None = None  # of a Trace
    held: tuple[str, ...] = ()  # of a Have, by key: the tensor's SHA-256, "" for one that is not here
    coming: tuple[int, ...] = ()  # ... places of the keys whose tensors are being fetched now
    inherited: tuple[TensorDigest, ...] = ()  # of an Inherit: files


@dataclass(frozen=True, slots=True)
class Progress:
    """Of an Assign, to its coordinator; phase "fetch" or "load"."""

    deployment: DeploymentId
    epoch: int
    phase: Literal["fetch", "load"]
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """A device tells a coordinator that its part of a deployment is gone (engine died, link lost)."""

    deployment: DeploymentId
    epoch: int
    reason: str
    engine_died: bool = False  # else a link broke, which may be the other end's fault
    other: DeviceId | None = None  # at the other end of that link


@dataclass(frozen=True, slots=True)
class Computing:
    """A coordinator tells the devices of a plan which request they compute for from now on, for their logs."""

    deployment: DeploymentId
    sequence: int
    request: str  # its id (request_ids.py)


@dataclass(frozen=True, slots=True)
class AnswerCopied:
    """A coordinator tells its successor of an answer under way that has a key; ids that come follow (AnswerGrew)."""

    deployment: DeploymentId
    answer: str  # what AnswerGrew calls it
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    client: str
    kept: str  # what only the API understands
    ids: tuple[int, ...]  # so far


@dataclass(frozen=True, slots=True)
class AnswerGrew:
    """More ids of that answer, from `start` on; `over`: it is complete, or forgotten."""

    deployment: DeploymentId
    answer: str
    start: int
    ids: tuple[int, ...]
    over: bool = False
    logprobs: tuple[bytes, ...] = ()  # of each id, if the answer is asked for them


Control = (
    Hello | Heartbeat | HeartbeatKey | Goodbye | Gossip | Whereabouts | DeviceView | LinkTable | Ask | Answer
    | Progress | Trouble | AnswerCopied | AnswerGrew | Computing
)  # fmt: skip
