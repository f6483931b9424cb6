"""What travels from stage to stage, as frames of the data plane and back (docs/wire.md §6), and what a link may carry.

Stages of one device hand the same parcels on as they are. A frame names the stage that it is for; the number of stages
stands for the source.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate, pairwise, repeat
from typing import Any, cast

import numpy as np

from peerllm.engine.base import Floats, Tensor
from peerllm.engine.messages import LoadStage
from peerllm.engine.weights.checkpoint import FILE_DTYPES
from peerllm.engine.wire.frame_arrays import DTYPE_NAMES, to_array, to_tensor
from peerllm.engine.wire.quantised import dequantise, quantise
from peerllm.errors import FrameError
from peerllm.logprobs import ENTRY_BYTES, MAX_ENTRIES, MAX_LIKELIEST
from peerllm.transport.frames.frame import Frame, FrameKind, NamedTensor
from peerllm.transport.frames.limits import FrameLimits, TensorLimit
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.links.channels import STEP
from peerllm.types import Pooling, Sampling

ALL_SEQUENCES = 2**64 - 1  # in a RELEASE: every sequence of the deployment
NO_TOKEN = -1  # in a TOKEN: the run passed the head, which was not to draw
MAX_REASON_BYTES = 512
MAX_MASK_BYTES = 128 << 10  # of a mask: a million tokens

DTYPES = {FILE_DTYPES[name].name: FILE_DTYPES[name] for name in ("F32", "F16", "BF16")}
_Entry = tuple[int, int, int, int, int, int]
_ENTRY = struct.Struct("<Qqqqqq")  # after, through, attempt, lacking, held, what the head makes
_POOLS: tuple[Pooling | None, ...] = (None, "mean", "last")
_LOGPROBS = len(_POOLS)  # what the head makes: a vector as in _POOLS, or from here on tokens with log probabilities
_SAMPLING = struct.Struct("<7d")  # temperature, top_p, top_k, min_p, the three penalties; the seed goes as an integer


@dataclass(frozen=True, slots=True)
class Opened:
    """A sequence enters an epoch, in `slot`, after its first `position` tokens; it goes round to the source.

    On the way each stage adds what it lacks of them.
    """

    sequence: int
    slot: int
    sampling: Sampling
    position: int = 0
    after: int = 0  # the ended sequence that left those tokens in the slot; 0: they are its own
    through: int = -1  # only layers up to this one are asked; -1: all
    attempt: int = 0  # rises with each that the source sends, of all sequences; from `first_attempt` of its epoch on
    lacking: int = -1  # the last layer of the last shard that cannot go on from `position`; -1: there is none
    held: int = 0  # where all shards can go on that cannot go on from `position`
    answer: Sequence[int] = ()  # the answer so far, if the head counts its tokens and is not on the source
    pool: Pooling | None = None  # the head gives one vector of the prompt's hidden states, and no token
    logprobs: int | None = None  # the head gives each token's log probability, and those of so many likeliest ones

    def lacks(self, layer: int, held: int) -> Opened:
        """With a shard added, whose last layer is `layer` and which can go on from `held` only."""
        least = held if self.lacking < 0 else min(held, self.held)
        return replace(self, lacking=max(self.lacking, layer), held=least)


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Runs that one pass computes, and what goes in: token ids int64 [tokens] for layer 0, else [tokens, hidden].

    With `scales` [tokens] the hidden states are int8, as they cross a slow link (engine/wire/quantised.py).
    """

    runs: Sequence[TokenRun]
    rows: Tensor
    scales: Floats | None = None

    def only(self, kept: Sequence[TokenRun]) -> TokenBatch:
        """The batch with these of its runs alone; itself if these are all."""
        if len(kept) == len(self.runs):
            return self
        mask = np.repeat([run in kept for run in self.runs], [run.length for run in self.runs])
        return TokenBatch(kept, self.rows[mask], None if self.scales is None else self.scales[mask])


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Runs that passed the head, each with the token drawn after it; None after all but a prompt's last chunk.

    Runs that are computed again pass the last layer that needs them instead, and then go round to the source as these.
    `vectors`, in the runs' order: of those that end a prompt whose states were pooled, and which have no token.
    `logprobs`: of each run's token as `packed` makes them, b"" where nobody asked; () if nobody did in all runs.
    """

    runs: Sequence[TokenRun]
    tokens: Sequence[int | None]
    vectors: Sequence[Floats] = ()
    logprobs: Sequence[bytes] = ()

    def each(self) -> Iterator[tuple[TokenRun, int | None, Floats | None, bytes]]:
        """Every run with its token, its vector and its token's log probabilities."""
        vectors, logprobs = iter(self.vectors), self.logprobs or repeat(b"", len(self.runs))
        for run, token, chances in zip(self.runs, self.tokens, logprobs, strict=True):
            yield run, token, next(vectors, None) if _may_have_vector(run, token) else None, chances


def _may_have_vector(run: TokenRun, token: int | None) -> bool:
    return run.sample and run.through < 0 and token is None


@dataclass(frozen=True, slots=True)
class Released:
    """A sequence gives its slot back, in which its first `keep` tokens stay for another to begin with.

    With a reason it failed at an earlier stage and the source must hear of it; then nothing stays.
    """

    sequence: int
    slot: int
    reason: str = ""
    keep: int = 0


@dataclass(frozen=True, slots=True)
class Masked:
    """Which tokens the head may draw for the place `position` of a sequence: a bit for each id, the lowest first.

    It goes from the source straight to the head, past the stages between: a mask tells much of the answer's text.
    """

    sequence: int
    slot: int
    position: int
    mask: bytes


Parcel = Opened | TokenBatch | Drawn | Released | Masked


def first_attempt(epoch: int) -> int:
    """The number before that of an epoch's first OPEN: whatever was sent in an earlier epoch came before."""
    return epoch << 32


def quantised(batch: TokenBatch) -> tuple[TokenBatch | None, list[TokenRun]]:
    """The batch in int8, and the runs left out because their numbers are not finite; None if no run is left."""
    whole = TokenBatch(batch.runs, *quantise(batch.rows))
    finite = np.isfinite(cast(Floats, whole.scales))
    if finite.all():
        return whole, []
    starts = list(accumulate(run.length for run in batch.runs))[:-1]
    rows = np.split(finite, starts)
    lost = [run for run, own in zip(batch.runs, rows, strict=True) if not own.all()]
    kept = [run for run in batch.runs if run not in lost]
    return whole.only(kept) if kept else None, lost


def dequantised(batch: TokenBatch, dtype: np.dtype[Any]) -> TokenBatch:
    """The batch in the compute dtype, if it came as int8; else itself."""
    if batch.scales is None:
        return batch
    return TokenBatch(batch.runs, dequantise(batch.rows, batch.scales, dtype))


def to_frame(parcel: Parcel, deployment: str, epoch: int, stage: int) -> Frame:
    """The frame that carries `parcel` to `stage`."""
    runs: tuple[TokenRun, ...]
    tensors: tuple[NamedTensor, ...]
    match parcel:
        case Opened(sequence, slot, sampling, position):
            kind, runs = FrameKind.OPEN, (TokenRun(sequence, slot, position, 0),)
            tensors = (*_sampling_tensors(sampling), *_entry_tensors(parcel))
        case TokenBatch(given, rows, scales):
            kind, runs = FrameKind.ACTIVATION, tuple(given)
            tensors = (to_tensor("hidden", rows), *(() if scales is None else (to_tensor("scale", scales),)))
        case Drawn(given, tokens, vectors, logprobs):
            kind, runs = FrameKind.TOKEN, tuple(given)
            ids = struct.pack(f"<{len(tokens)}q", *(NO_TOKEN if token is None else token for token in tokens))
            pooled = (to_tensor("vectors", np.stack(vectors)),) if vectors else ()
            tensors = (NamedTensor.of("ids", "I64", (len(tokens),), ids), *pooled, *_logprob_tensors(logprobs))
        case Released(sequence, slot, reason, keep):
            kind, runs = FrameKind.RELEASE, (TokenRun(sequence, slot, keep, 0),)
            text = reason.encode(errors="replace")[:MAX_REASON_BYTES]
            tensors = (NamedTensor.of("reason", "U8", (len(text),), text),) if text else ()
        case Masked(sequence, slot, position, mask):
            kind, runs = FrameKind.MASK, (TokenRun(sequence, slot, position, 0),)
            small = zlib.compress(mask, 1)  # mostly to some tens of bytes, and never to much more than it was
            tensors = (NamedTensor.of("mask", "U8", (len(small),), small),)
    return Frame(kind, deployment, epoch, stage, runs, tensors)


def from_frame(frame: Frame) -> list[Parcel]:
    """What a checked frame carries; FrameError where its values, not its shape, are wrong."""
    match frame.kind:
        case FrameKind.OPEN:
            entries = _ENTRY.iter_unpack(_require(frame, "entry").data)
            answer = frame.tensor("answer")
            ids = () if answer is None else tuple(to_array(answer).tolist())
            return [
                Opened(
                    run.sequence,
                    run.slot,
                    _read_sampling(frame, row),
                    run.position,
                    *entry[:5],
                    ids,
                    *_made(entry[5]),
                )
                for row, (run, entry) in enumerate(zip(frame.runs, cast(Iterator[_Entry], entries), strict=True))
            ]
        case FrameKind.ACTIVATION:
            hidden = _require(frame, "hidden")
            if hidden.dtype != "I8":
                return [TokenBatch(frame.runs, to_array(hidden))]
            scales = to_array(_require(frame, "scale"))
            if not (float(scales.min()) > 0 and float(scales.max()) < math.inf):  # NaN is neither
                raise FrameError("a scale is no positive number")
            return [TokenBatch(frame.runs, to_array(hidden), scales)]
        case FrameKind.TOKEN:
            ids = struct.unpack(f"<{len(frame.runs)}q", _require(frame, "ids").data)
            if min(ids) < NO_TOKEN:
                raise FrameError(f"{min(ids)} is no token id")
            vectors = frame.tensor("vectors")
            pooled = () if vectors is None else tuple(to_array(vectors))
            tokens = [None if token == NO_TOKEN else token for token in ids]
            if len(pooled) > sum(map(_may_have_vector, frame.runs, tokens)):
                raise FrameError(f"{len(pooled)} vectors came for prompts that are not there")
            return [Drawn(frame.runs, tokens, pooled, _read_logprobs(frame, tokens))]
        case FrameKind.RELEASE:
            reason = frame.tensor("reason")
            text = "" if reason is None else bytes(reason.data).decode(errors="replace")
            return [Released(run.sequence, run.slot, text, run.position) for run in frame.runs]
        case FrameKind.MASK:
            mask = _inflated(_require(frame, "mask"))
            return [Masked(run.sequence, run.slot, run.position, mask) for run in frame.runs]
        case _:
            raise FrameError(f"{frame.kind.name} is no frame of a step")


def stage_limits(spec: LoadStage, hidden_size: int) -> FrameLimits:
    """What the link into `spec`'s stage may carry."""
    known = tuple(DTYPE_NAMES[dtype] for name, dtype in DTYPES.items() if spec.dtype in ("auto", name))
    scale = {}
    if spec.upstream_activations == "int8":
        known = ("I8",)
        scale = {"scale": TensorLimit(("F32",), 1, per_token=True, required=True, kinds=(FrameKind.ACTIVATION,))}
    tensors = {
        "hidden": TensorLimit(known, 2, hidden_size, per_token=True, required=True, kinds=(FrameKind.ACTIVATION,)),
        **scale,
        "answer": TensorLimit(("I64",), 1, max_elements=spec.context, kinds=(FrameKind.OPEN,)),
    }
    return _limits(spec, spec.stage, tuple(kind for kind in STEP.kinds if kind is not FrameKind.MASK), tensors)


def source_limits(spec: LoadStage, hidden_size: int) -> FrameLimits:
    """What the link from the head back to the source may carry; no vector has more numbers than `hidden_size`."""
    most = spec.micro_batch * hidden_size
    entries = spec.micro_batch * MAX_ENTRIES * ENTRY_BYTES
    tensors = {
        "vectors": TensorLimit(("F32",), 2, max_elements=most, kinds=(FrameKind.TOKEN,)),
        "counts": TensorLimit(("U8",), 1, per_run=True, kinds=(FrameKind.TOKEN,)),
        "logprobs": TensorLimit(("U8",), 2, ENTRY_BYTES, max_elements=entries, kinds=(FrameKind.TOKEN,)),
    }
    return _limits(spec, spec.stages, (FrameKind.TOKEN, FrameKind.RELEASE, FrameKind.OPEN), tensors)


def head_limits(spec: LoadStage) -> FrameLimits:
    """What the source may send to the head of `spec` on the link that brings it tokens."""
    mask = TensorLimit(("U8",), 1, max_elements=MAX_MASK_BYTES, required=True, kinds=(FrameKind.MASK,))
    return FrameLimits(
        spec.deployment, spec.epoch, spec.stage, (FrameKind.MASK,), 1, spec.slots, spec.context, 1, {"mask": mask}
    )


def _limits(spec: LoadStage, stage: int, kinds: tuple[FrameKind, ...], tensors: dict[str, TensorLimit]) -> FrameLimits:
    tensors = tensors | {
        "sampling": TensorLimit(("F64",), 2, 7, per_run=True, required=True, kinds=(FrameKind.OPEN,)),
        "seed": TensorLimit(("I64",), 1, per_run=True, required=True, kinds=(FrameKind.OPEN,)),
        "entry": TensorLimit(("I64",), 2, 6, per_run=True, required=True, kinds=(FrameKind.OPEN,)),
        "ids": TensorLimit(("I64",), 1, per_run=True, required=True, kinds=(FrameKind.TOKEN,)),
        "reason": TensorLimit(("U8",), 1, max_elements=MAX_REASON_BYTES, kinds=(FrameKind.RELEASE,)),
    }
    return FrameLimits(
        deployment=spec.deployment,
        epoch=spec.epoch,
        stage=stage,
        kinds=kinds,
        max_runs=spec.micro_batch,
        slots=spec.slots,
        context=spec.context,
        max_tokens=max(spec.chunk, spec.micro_batch),
        tensors=tensors,
    )


def _sampling_tensors(sampling: Sampling) -> tuple[NamedTensor, ...]:
    *numbers, seed = astuple(sampling)
    return (
        NamedTensor.of("sampling", "F64", (1, 7), _SAMPLING.pack(*numbers)),
        NamedTensor.of("seed", "I64", (1,), struct.pack("<q", seed)),
    )


def _entry_tensors(opened: Opened) -> list[NamedTensor]:
    made = _POOLS.index(opened.pool) if opened.logprobs is None else _LOGPROBS + opened.logprobs
    entry = _ENTRY.pack(opened.after, opened.through, opened.attempt, opened.lacking, opened.held, made)
    ids = struct.pack(f"<{len(opened.answer)}q", *opened.answer)
    answer = [NamedTensor.of("answer", "I64", (len(opened.answer),), ids)] if opened.answer else []
    return [NamedTensor.of("entry", "I64", (1, 6), entry), *answer]


def _made(number: int) -> tuple[Pooling | None, int | None]:
    """Whether the head makes a vector, and how many log probabilities of others come with a token."""
    if not 0 <= number <= _LOGPROBS + MAX_LIKELIEST:
        raise FrameError(f"{number} is nothing that a head can make")
    return (_POOLS[number], None) if number < _LOGPROBS else (None, number - _LOGPROBS)


def _logprob_tensors(logprobs: Sequence[bytes]) -> tuple[NamedTensor, ...]:
    if not logprobs:
        return ()
    data, counts = b"".join(logprobs), bytes(len(one) // ENTRY_BYTES for one in logprobs)
    shape = len(data) // ENTRY_BYTES, ENTRY_BYTES
    return NamedTensor.of("counts", "U8", (len(counts),), counts), NamedTensor.of("logprobs", "U8", shape, data)


def _read_logprobs(frame: Frame, tokens: Sequence[int | None]) -> tuple[bytes, ...]:
    counts, entries = frame.tensor("counts"), frame.tensor("logprobs")
    if counts is None or entries is None:
        if counts is not entries:
            raise FrameError("log probabilities came without their counts, or counts alone")
        return ()
    ends = list(accumulate((count * ENTRY_BYTES for count in counts.data), initial=0))
    drawn = all(token is not None or not count for token, count in zip(tokens, counts.data, strict=True))
    if ends[-1] != len(entries.data) or not drawn:
        raise FrameError("log probabilities came for tokens that are not there")
    return tuple(bytes(entries.data[start:end]) for start, end in pairwise(ends))


def _read_sampling(frame: Frame, row: int) -> Sampling:
    temperature, top_p, top_k, min_p, repetition, presence, frequency = cast(
        tuple[float, ...], _SAMPLING.unpack_from(_require(frame, "sampling").data, row * _SAMPLING.size)
    )
    (seed,) = struct.unpack_from("<q", _require(frame, "seed").data, row * 8)
    try:
        return Sampling(temperature, top_p, int(top_k), min_p, repetition, presence, frequency, seed)
    except (ValueError, OverflowError) as error:
        raise FrameError(f"bad sampling: {error}") from error


def _inflated(small: NamedTensor) -> bytes:
    inflating = zlib.decompressobj()
    try:
        mask = inflating.decompress(small.data, MAX_MASK_BYTES)
    except zlib.error as error:
        raise FrameError(f"a mask that cannot be inflated: {error}") from error
    if not inflating.eof or inflating.unused_data:
        raise FrameError("a mask that is too long, or not whole")
    return mask


def _require(frame: Frame, name: str) -> NamedTensor:
    tensor = frame.tensor(name)
    if tensor is None:
        raise FrameError(f"{frame.kind.name} frame without {name!r}")
    return tensor
