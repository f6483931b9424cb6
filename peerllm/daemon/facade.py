"""The small face of the daemon that the API sees: all that the CLI, the page and clients do goes through it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Protocol

from aiohttp import web

from peerllm.daemon.facade_objects import EngineStatus, HouseholdStatus, LimitsStatus, MeasuredSpeed, Preview
from peerllm.engine.messages import Constraint, FinishReason
from peerllm.logprobs import named_ids
from peerllm.types import STORED, Activations, DeploymentId, DeviceId, Objective, Pooling, Sampling, ScheduleName

MAX_PROMPT_CHUNK = 4096
MAX_BENCH_SEQUENCES = 256
MAX_BENCH_TOKENS = 4096  # of a prompt, and of an answer
ANY_TAG = ":latest"  # that Ollama's clients put behind names
_PREFIXES = ("hf.co/", "huggingface.co/")
_GGUF = ".gguf"
_DTYPE_LEVELS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PART = re.compile(r"-\d{5}-of-\d{5}$")  # of a model in several files


def short_name(model: str) -> str:
    """What a model is called where nobody names it: the last part of its path or hub id, of a GGUF file its stem."""
    name = PurePath(model).name or model
    return _PART.sub("", name[: -len(_GGUF)]) if name.lower().endswith(_GGUF) and len(name) > len(_GGUF) else name


def without_prefix(model: str) -> str:
    """A hub id without what other programs want before it."""
    return next((model.removeprefix(one) for one in _PREFIXES if model.startswith(one)), model)


IDLE_MODEL = "idle"  # the state of a model that is on a disk and does not run


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What `peerllm run` asks for. `context` and `slots` None: chosen by the coordinator."""

    model: str  # Hugging Face id (with a quantisation behind a colon), path, well-known name or "builtin"
    objective: Objective = "latency"
    context: int | None = None
    slots: int | None = None
    dtype: str = "auto"
    quantize: str = "auto"  # one of types.QUANTIZE
    prompt_chunk: int | None = None  # tokens of a prompt that travel together
    private: bool = False  # the head stays on the source
    schedule: ScheduleName = "no-bubble"  # the others are there to compare with
    activations: Activations = "auto"  # how hidden states travel
    name: str = ""  # what the deployment is to be called; "": its `short_name`
    on_demand: bool = False  # a request started it, and no person: it is unloaded when nobody asks for it


@dataclass(frozen=True, slots=True)
class RunProgress:
    """One line of a deployment's way to `serving`: what is happening, and how far each device is (0 to 1)."""

    state: str
    message: str
    devices: Mapping[str, float] = field(default_factory=dict)  # device name: share done


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """Of a model's weights what is known: "" and 0 is not."""

    family: str = ""  # its architecture
    parameters: int = 0
    file_format: str = ""  # "gguf" or "safetensors"
    level: str = ""  # what they are rounded to, as "Q4_K_M", "INT8" or "BF16"

    @classmethod
    def of(cls, family: str, parameters: int, form: str, quantize: str, dtype: str) -> ModelDetails:
        """`form` as in ModelOnDisk; `quantize` and `dtype` as in Inspected."""
        if not family:
            return cls()
        level = form if quantize == STORED else quantize.upper() or _DTYPE_LEVELS.get(dtype, "")
        return cls(family, parameters, "gguf" if form else "safetensors", level)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A deployment of the household as the API needs it; only its source has `model_dir` and `stop_ids`.

    One that is on a disk and not running has the state IDLE_MODEL and no deployment.
    """

    deployment: DeploymentId
    name: str  # what clients put in "model"; `model` is understood as well
    model: str  # as `run` was told it: a path, a hub id or "builtin"
    state: str
    reason: str
    created: int  # unix seconds
    model_dir: Path | None  # tokenizer.json and the chat template lie here; None until they are found
    context: int  # 0: not known yet
    stop_ids: tuple[int, ...]
    message: str = ""  # what is being done until it serves ...
    progress: float = 0.0  # ... and how much of that is done, 0 to 1
    missing_bytes: int = 0  # memory that the household lacks for it
    source: DeviceId = ""  # the device that answers for it; "": this one, or none now
    names: frozenset[str] = frozenset()  # in lower case, all by which it is understood besides
    expires: int = 0  # unix seconds at which it is unloaded if nobody asks for it; 0: never
    abilities: tuple[str, ...] = ()  # besides going on with a text: "tools", "thinking", "embedding"
    disk_bytes: int = 0  # of its files, where it is known only as a model on a disk
    details: ModelDetails = ModelDetails()
    alias: bool = False  # `name` is another name that a client gave a model


@dataclass(frozen=True, slots=True)
class RelayedAnswer:
    """What another device answered; `body` comes piece by piece as it is sent there."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


PeerHandler = Callable[[web.Request, DeviceId], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Token ids in; `client` groups requests for fairness, and for what a slot may be taken up again."""

    deployment: DeploymentId
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    client: str = ""
    ignore_stop: bool = False  # go on to max_tokens whatever the model says
    patience_s: float | None = None  # how long it waits for a deployment that does not serve; None: as usual
    answer: Sequence[int] = ()  # ids of the answer that are known already: it goes on after them
    kept: str = ""  # what the API needs to go on with the answer on another device; "": it ends with this one
    constraint: Constraint | None = None  # what the answer's text must be
    pool: Pooling | None = None  # there is no answer: the last chunk has the prompt's hidden states as one vector
    keep_alive_s: float | None = None  # how long the model stays loaded after it; below 0: for good, None: as usual
    logprobs: int | None = None  # with each token come its log probability and those of so many likeliest ones
    known_logprobs: Sequence[bytes] = ()  # of the ids in `answer`, if they are asked for


@dataclass(frozen=True, slots=True)
class InheritedAnswer:
    """An answer that another device began and cannot go on with; `kept` is what its API said of it."""

    deployment: DeploymentId
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    client: str
    kept: str
    ids: Sequence[int]  # so far
    logprobs: Sequence[bytes] = ()  # of each of them, if they were asked for; all of one length

    @property
    def size(self) -> int:
        """Of all its ids, and of those that its log probabilities name."""
        return len(self.prompt) + len(self.ids) * (1 + named_ids(self.logprobs))


@dataclass(frozen=True, slots=True)
class Chunk:
    """New token ids; the last chunk has `finish`. `queued`: place in the queue, told without ids (0: it has a slot)."""

    ids: tuple[int, ...]
    finish: FinishReason | None = None
    queued: int = 0
    reused: int = 0  # tokens of the prompt that were computed for an earlier sequence of this client
    vector: tuple[float, ...] = ()  # of a request with `pool`, float32
    logprobs: tuple[bytes, ...] = ()  # of each id, of a request for them; see logprobs.unpacked


class Household(Protocol):
    """What the API may ask of the daemon. Errors are PeerLLMErrors with the HTTP status to answer with."""

    async def started(self) -> None:
        """Returns when the device can be used; until then only `status` and `changed` may be asked."""
        ...

    def status(self) -> HouseholdStatus:
        """What `peerllm status --json` prints, see docs/json.md."""
        ...

    async def engine(self) -> EngineStatus:
        """What this device's engine holds at this moment: stages with slots in use, bytes, measured step times."""
        ...

    def changed(self) -> AsyncIterator[None]:
        """Yields at once, then after every change of `status`, at most a few times a second."""
        ...

    def models(self) -> list[ServedModel]:
        """Every model of the household, whichever device it was started on; those started here first."""
        ...

    def relay(
        self, source: DeviceId, path: str, headers: Mapping[str, str], body: bytes
    ) -> AbstractAsyncContextManager[RelayedAnswer]:
        """POST to another device's API; leaving early hangs up there. LinkError while it cannot be reached.

        LinkError also ends a body when that device vanishes.
        """
        ...

    def answer_peers(self, handler: PeerHandler) -> None:
        """Let `handler` answer what other devices of the household relay to this one, from now on."""
        ...

    def inherit_answers(self, handler: Callable[[InheritedAnswer], None]) -> None:
        """Let `handler` go on with answers whose source is lost, from now on."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Closing the iterator cancels the sequence on every device. EngineError if it breaks midway."""
        ...

    async def run(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> str:
        """The deployment's name, when it serves (at once if it does already); raises with the reason if it will not."""
        ...

    async def start_model(self, model: str) -> None:
        """Start a model that is on this disk, for requests; returns when it serves, raises why it does not."""
        ...

    async def keep(self, deployment: DeploymentId, keep_alive_s: float | None) -> None:
        """A request that says only how long the model stays loaded; 0: it is unloaded when this returns."""
        ...

    async def pull(self, name: str, told: Callable[[int, int], None]) -> None:
        """Fetch a model to this disk; `told`: bytes done, and in all (0: not known). Cancelling ends it."""
        ...

    async def alias(self, name: str, model: str) -> None:
        """Let clients call a model by this name, too."""
        ...

    async def delete(self, name: str) -> None:
        """Delete such a name, or a model that was pulled; BadInputError says why that is not done."""
        ...

    async def preview(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> Preview:
        """What `run` would plan for now; nothing is reserved or loaded.

        "scenario" is the file of it, "most_chunk" the tokens of its largest prompt chunk, "rounded_layers" the layers
        whose outputs would travel as int8, "weights" in words how they would be held.
        """
        ...

    async def scenario(self, model: str) -> dict[str, Any]:
        """Of a model started here: what it was planned for, and its plan.

        "scenario" is the file of what was planned for, "running" the same with links and stages as they are now;
        "paces": by stage, what a batch of so many sequences takes there; "spreads": that one's deviation as a share
        of it; "stages", "micro_batch", "micro_batches", "schedule", "cuts".
        """
        ...

    async def bench(
        self, model: str, sequences: int, prompt_tokens: int, output_tokens: int, apart: bool = False
    ) -> MeasuredSpeed:
        """Answers of a fixed length, begun at once or one after another, measured (daemon/status/serving_speed.py)."""
        ...

    async def record(self, model: str) -> int:
        """Begin to record what every device of a model started here does when; a number for `recorded`."""
        ...

    async def recorded(self, model: str, recording: int) -> bytes:
        """End that and give what was recorded: JSON that chrome://tracing and Perfetto open."""
        ...

    async def stop(self, model: str) -> None: ...

    async def invite(self) -> tuple[str, int]:
        """Open the pairing door: (code, port)."""
        ...

    def hosts(self) -> tuple[str, ...]:
        """The addresses at which other devices reach this one, the likeliest first."""
        ...

    async def join(self, code: str, at: tuple[str, int] | None) -> str:
        """Pair with the household behind the code, found by mDNS without `at`; the inviter's name."""
        ...

    async def leave(self) -> None: ...

    def limits(self) -> LimitsStatus:
        """What the owner allows (decide/owner_limits.OwnerLimits), and "leaving": why nothing is lent now, or ""."""
        ...

    async def set_limits(self, changes: Mapping[str, Any]) -> LimitsStatus:
        """Set some of them, for now and later starts; gives all. BadInputError names what is no limit."""
        ...

    async def remove(self, device: str) -> None:
        """Remove a device (name or id) from the household."""
        ...
