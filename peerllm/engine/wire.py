"""What travels from stage to stage, as frames of the data plane and back (docs/wire.md), and what a link may carry.

Within a device the same parcels are handed on as they are. A frame's stage is whom it is for; `stages` is the source.
"""

from __future__ import annotations

import ctypes
import math
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from peerllm.engine.activations import restored, rounded
from peerllm.engine.base import Tensor
from peerllm.engine.batching import Piece
from peerllm.engine.messages import LoadStage
from peerllm.errors import FrameError
from peerllm.transport.frames import SAMPLE, Frame, FrameKind, FrameLimits, FrameSegment, NamedTensor, TensorLimit
from peerllm.types import Sampling

ALL_SEQUENCES = 2**64 - 1  # in a RELEASE: every sequence of the deployment
NO_TOKEN = -1  # in a TOKEN: the run passed the head, which was not to draw
MAX_REASON_BYTES = 512

_DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {torch.int8: "I8"}
_SAMPLING = struct.Struct("<7d")  # temperature, top_p, top_k, min_p, the three penalties; the seed goes as an integer


@dataclass(frozen=True, slots=True)
class Opened:
    """A sequence begins in `slot`, with the first `position` tokens that an earlier one left there."""

    sequence: int
    slot: int
    sampling: Sampling
    position: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """What a stage made of a batch: `hidden` is [tokens of all pieces, hidden].

    With `split` the pieces hold their rows of it; else their data is what it was made of.
    """

    pieces: Sequence[Piece]
    hidden: Tensor
    split: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """An Activation as it crosses a slow link (engine/activations.py): `values` int8 [n, hidden], `scales` [n]."""

    pieces: Sequence[Piece]
    values: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Runs that passed the head and the tokens it drew after them (None: it was not to)."""

    pieces: Sequence[Piece]
    tokens: Sequence[int | None]


@dataclass(frozen=True, slots=True)
class Released:
    """A sequence gives its slot back, in which its first `keep` tokens stay for another to begin with.

    With a reason it failed at an earlier stage and the source must hear of it; then nothing stays.
    """

    sequence: int
    slot: int
    reason: str = ""
    keep: int = 0


Parcel = Opened | Activation | Rounded | Drawn | Released

with warnings.catch_warnings():
    # Torch warns once that it cannot keep anybody from writing to the bytes of a frame; nobody else reads those.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def split(activation: Activation) -> list[Piece]:
    """The pieces, each with its rows of `hidden`."""
    if activation.split:
        return list(activation.pieces)
    if len(activation.pieces) == 1:
        return [_with(activation.pieces[0], activation.hidden)]
    rows = torch.split(activation.hidden, [piece.length for piece in activation.pieces])
    return [_with(piece, data) for piece, data in zip(activation.pieces, rows, strict=True)]


def shorten(activation: Activation) -> tuple[Rounded | None, list[Piece]]:
    """The activation rounded, and the pieces left out because their numbers are not finite; None if none is left."""
    values, scales = rounded(activation.hidden)
    if math.isfinite(float(scales.sum())):
        return Rounded(activation.pieces, values, scales), []
    lengths = [piece.length for piece in activation.pieces]
    sound = [bool(own.isfinite().all()) for own in torch.split(scales, lengths)]
    kept = [piece for piece, good in zip(activation.pieces, sound, strict=True) if good]
    lost = [piece for piece, good in zip(activation.pieces, sound, strict=True) if not good]
    if not kept:
        return None, lost
    rows = torch.tensor(sound).repeat_interleave(torch.tensor(lengths))
    return Rounded(kept, values[rows], scales[rows]), lost


def lengthen(parcel: Rounded, dtype: torch.dtype) -> Activation:
    """The other way round, in the compute dtype."""
    return Activation(parcel.pieces, restored(parcel.values, parcel.scales, dtype))


def to_frame(parcel: Parcel, deployment: str, epoch: int, stage: int) -> Frame:
    """The frame that carries `parcel` to `stage`."""
    segments: tuple[FrameSegment, ...]
    tensors: tuple[NamedTensor, ...]
    match parcel:
        case Opened(sequence, slot, sampling, position):
            kind, segments = FrameKind.OPEN, (FrameSegment(sequence, slot, position, 0),)
            tensors = _sampling_tensors(sampling)
        case Activation(pieces, hidden):
            kind, segments = FrameKind.ACTIVATION, _segments(pieces)
            tensors = (_tensor("hidden", hidden),)
        case Rounded(pieces, values, scales):
            kind, segments = FrameKind.ACTIVATION, _segments(pieces)
            tensors = (_tensor("hidden", values), _tensor("scale", scales))
        case Drawn(pieces, tokens):
            kind, segments = FrameKind.TOKEN, _segments(pieces)
            ids = struct.pack(f"<{len(tokens)}q", *(NO_TOKEN if token is None else token for token in tokens))
            tensors = (NamedTensor.of("ids", "I64", (len(tokens),), ids),)
        case Released(sequence, slot, reason, keep):
            kind, segments = FrameKind.RELEASE, (FrameSegment(sequence, slot, keep, 0),)
            text = reason.encode()[:MAX_REASON_BYTES]
            tensors = (NamedTensor.of("reason", "U8", (len(text),), text),) if text else ()
    return Frame(kind, deployment, epoch, stage, segments, tensors)


def from_frame(frame: Frame) -> list[Parcel]:
    """What a checked frame carries; FrameError where its values, not its shape, are wrong."""
    match frame.kind:
        case FrameKind.OPEN:
            return [
                Opened(segment.sequence, segment.slot, _read_sampling(frame, row), segment.position)
                for row, segment in enumerate(frame.segments)
            ]
        case FrameKind.ACTIVATION:
            hidden = _require(frame, "hidden")
            if hidden.dtype != "I8":
                came = Activation(_pieces(frame), _read(hidden, _DTYPES[hidden.dtype]))
                return [Activation(split(came), came.hidden, split=True)]
            scales = _read(_require(frame, "scale"), torch.float32)
            if not (float(scales.min()) > 0 and float(scales.max()) < math.inf):  # NaN is neither
                raise FrameError("a scale is no positive number")
            return [Rounded(_pieces(frame), _read(hidden, torch.int8), scales)]
        case FrameKind.TOKEN:
            ids = struct.unpack(f"<{len(frame.segments)}q", _require(frame, "ids").data)
            if min(ids) < NO_TOKEN:
                raise FrameError(f"{min(ids)} is no token id")
            return [Drawn(_pieces(frame), [None if token == NO_TOKEN else token for token in ids])]
        case FrameKind.RELEASE:
            reason = frame.tensor("reason")
            text = "" if reason is None else bytes(reason.data).decode(errors="replace")
            return [Released(at.sequence, at.slot, text, at.position) for at in frame.segments]


def stage_limits(spec: LoadStage, hidden_size: int) -> FrameLimits:
    """What the link into `spec`'s stage may carry."""
    known = tuple(name for name in _DTYPES if spec.dtype in ("auto", str(_DTYPES[name]).removeprefix("torch.")))
    scale = {}
    if spec.upstream_activations == "int8":
        known = ("I8",)
        scale = {"scale": TensorLimit(("F32",), 1, per_token=True, required=True, kinds=(FrameKind.ACTIVATION,))}
    return FrameLimits(
        deployment=spec.deployment,
        epoch=spec.epoch,
        stage=spec.stage,
        kinds=(FrameKind.OPEN, FrameKind.ACTIVATION, FrameKind.RELEASE),
        max_segments=spec.micro_batch,
        slots=spec.slots,
        context=spec.context,
        max_tokens=max(spec.chunk, spec.micro_batch),
        tensors={
            "hidden": TensorLimit(known, 2, hidden_size, per_token=True, required=True, kinds=(FrameKind.ACTIVATION,)),
            **scale,
            "sampling": TensorLimit(("F64",), 2, 7, per_segment=True, required=True, kinds=(FrameKind.OPEN,)),
            "seed": TensorLimit(("I64",), 1, per_segment=True, required=True, kinds=(FrameKind.OPEN,)),
            "reason": TensorLimit(("U8",), 1, max_elements=MAX_REASON_BYTES, kinds=(FrameKind.RELEASE,)),
        },
    )


def source_limits(spec: LoadStage) -> FrameLimits:
    """What the link from the head back to the source may carry."""
    return FrameLimits(
        deployment=spec.deployment,
        epoch=spec.epoch,
        stage=spec.stages,
        kinds=(FrameKind.TOKEN, FrameKind.RELEASE),
        max_segments=spec.micro_batch,
        slots=spec.slots,
        context=spec.context,
        max_tokens=max(spec.chunk, spec.micro_batch),
        tensors={
            "ids": TensorLimit(("I64",), 1, per_segment=True, required=True, kinds=(FrameKind.TOKEN,)),
            "reason": TensorLimit(("U8",), 1, max_elements=MAX_REASON_BYTES, kinds=(FrameKind.RELEASE,)),
        },
    )


def _with(piece: Piece, data: Tensor) -> Piece:
    return Piece(piece.sequence, piece.slot, piece.position, piece.length, piece.sample, data)


def _segments(pieces: Sequence[Piece]) -> tuple[FrameSegment, ...]:
    return tuple(
        FrameSegment(piece.sequence, piece.slot, piece.position, piece.length, SAMPLE if piece.sample else 0)
        for piece in pieces
    )


def _pieces(frame: Frame) -> list[Piece]:
    return [
        Piece(at.sequence, at.slot, at.position, at.length, bool(at.flags & SAMPLE), None)
        for at in frame.segments
    ]


def _tensor(name: str, tensor: torch.Tensor) -> NamedTensor:
    """A view of the tensor's memory."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.to("cpu").contiguous()
    # Torch's own way, view(uint8).numpy(), costs twice as much while the caches are full of weights.
    raw = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    raw.tensor = tensor  # type: ignore[attr-defined]  # as long as the view lives, so does the memory
    return NamedTensor(name, _NAMES[tensor.dtype], tuple(tensor.shape), memoryview(raw).cast("B"))


def _read(tensor: NamedTensor, dtype: torch.dtype) -> torch.Tensor:
    """A view of the frame's memory."""
    flat, shape = torch.frombuffer(tensor.data, dtype=dtype), tensor.shape
    return flat[None] if len(shape) == 2 and shape[0] == 1 else flat.reshape(shape)


def _sampling_tensors(sampling: Sampling) -> tuple[NamedTensor, ...]:
    numbers = _SAMPLING.pack(
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    )
    return (
        NamedTensor.of("sampling", "F64", (1, 7), numbers),
        NamedTensor.of("seed", "I64", (1,), struct.pack("<q", sampling.seed)),
    )


def _read_sampling(frame: Frame, row: int) -> Sampling:
    temperature, top_p, top_k, min_p, repetition, presence, frequency = cast(
        tuple[float, ...], _SAMPLING.unpack_from(_require(frame, "sampling").data, row * _SAMPLING.size)
    )
    (seed,) = struct.unpack_from("<q", _require(frame, "seed").data, row * 8)
    try:
        return Sampling(temperature, top_p, int(top_k), min_p, repetition, presence, frequency, seed)
    except (ValueError, OverflowError) as error:
        raise FrameError(f"bad sampling: {error}") from error


def _require(frame: Frame, name: str) -> NamedTensor:
    tensor = frame.tensor(name)
    if tensor is None:
        raise FrameError(f"{frame.kind.name} frame without {name!r}")
    return tensor
