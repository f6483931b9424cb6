"""What travels from stage to stage, as frames of the data plane and back (docs/wire.md), and what a link may carry.

Within a device the same parcels are handed on as they are. A frame's stage is whom it is for; `stages` is the source.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate
from typing import Any, cast

import numpy as np

from peerllm.engine.base import Floats, Tensor
from peerllm.engine.messages import LoadStage
from peerllm.engine.schedule.batching import Piece
from peerllm.engine.weights.checkpoint import FILE_DTYPES
from peerllm.engine.wire.quantised import restored, rounded
from peerllm.errors import FrameError
from peerllm.transport.frames import SAMPLE, Frame, FrameKind, FrameLimits, FrameSegment, NamedTensor, TensorLimit
from peerllm.types import Sampling

ALL_SEQUENCES = 2**64 - 1  # in a RELEASE: every sequence of the deployment
NO_TOKEN = -1  # in a TOKEN: the run passed the head, which was not to draw
MAX_REASON_BYTES = 512

DTYPES = {FILE_DTYPES[name].name: FILE_DTYPES[name] for name in ("F32", "F16", "BF16")}
_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}
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
    """What a stage made of a batch: `hidden` is [tokens of all pieces, hidden]; their own data is what came in.

    With `scales` [tokens] it is rounded to int8, as it crosses a slow link (engine/wire/quantised.py).
    """

    pieces: Sequence[Piece]
    hidden: Tensor
    scales: Floats | None = None


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


Parcel = Opened | Activation | Drawn | Released


def split(activation: Activation) -> list[Piece]:
    """The pieces, each with its rows of `hidden`."""
    rows = np.split(activation.hidden, _starts(activation.pieces))
    return [replace(piece, data=data) for piece, data in zip(activation.pieces, rows, strict=True)]


def shorten(activation: Activation) -> tuple[Activation | None, list[Piece]]:
    """The activation rounded, and the pieces left out because their numbers are not finite; None if none is left."""
    values, scales = rounded(activation.hidden)
    finite = np.isfinite(scales)
    if finite.all():
        return Activation(activation.pieces, values, scales), []
    sound = [bool(own.all()) for own in np.split(finite, _starts(activation.pieces))]
    kept = [piece for piece, good in zip(activation.pieces, sound, strict=True) if good]
    lost = [piece for piece, good in zip(activation.pieces, sound, strict=True) if not good]
    if not kept:
        return None, lost
    rows = np.repeat(sound, [piece.length for piece in activation.pieces])
    return Activation(kept, values[rows], scales[rows]), lost


def lengthen(parcel: Activation, dtype: np.dtype[Any]) -> Activation:
    """The other way round, in the compute dtype."""
    assert parcel.scales is not None
    return Activation(parcel.pieces, restored(parcel.hidden, parcel.scales, dtype))


def to_frame(parcel: Parcel, deployment: str, epoch: int, stage: int) -> Frame:
    """The frame that carries `parcel` to `stage`."""
    segments: tuple[FrameSegment, ...]
    tensors: tuple[NamedTensor, ...]
    match parcel:
        case Opened(sequence, slot, sampling, position):
            kind, segments = FrameKind.OPEN, (FrameSegment(sequence, slot, position, 0),)
            tensors = _sampling_tensors(sampling)
        case Activation(pieces, hidden, scales):
            kind, segments = FrameKind.ACTIVATION, _segments(pieces)
            tensors = (_tensor("hidden", hidden), *(() if scales is None else (_tensor("scale", scales),)))
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
                return [Activation(_pieces(frame), _read(hidden))]
            scales = _read(_require(frame, "scale"))
            if not (float(scales.min()) > 0 and float(scales.max()) < math.inf):  # NaN is neither
                raise FrameError("a scale is no positive number")
            return [Activation(_pieces(frame), _read(hidden), scales)]
        case FrameKind.TOKEN:
            ids = struct.unpack(f"<{len(frame.segments)}q", _require(frame, "ids").data)
            if min(ids) < NO_TOKEN:
                raise FrameError(f"{min(ids)} is no token id")
            return [Drawn(_pieces(frame), [None if token == NO_TOKEN else token for token in ids])]
        case FrameKind.RELEASE:
            reason = frame.tensor("reason")
            text = "" if reason is None else bytes(reason.data).decode(errors="replace")
            return [Released(at.sequence, at.slot, text, at.position) for at in frame.segments]
        case _:
            raise FrameError(f"{frame.kind.name} is no frame of a step")


def stage_limits(spec: LoadStage, hidden_size: int) -> FrameLimits:
    """What the link into `spec`'s stage may carry."""
    known = tuple(_NAMES[dtype] for name, dtype in DTYPES.items() if spec.dtype in ("auto", name))
    scale = {}
    if spec.upstream_activations == "int8":
        known = ("I8",)
        scale = {"scale": TensorLimit(("F32",), 1, per_token=True, required=True, kinds=(FrameKind.ACTIVATION,))}
    tensors = {
        "hidden": TensorLimit(known, 2, hidden_size, per_token=True, required=True, kinds=(FrameKind.ACTIVATION,)),
        **scale,
        "sampling": TensorLimit(("F64",), 2, 7, per_segment=True, required=True, kinds=(FrameKind.OPEN,)),
        "seed": TensorLimit(("I64",), 1, per_segment=True, required=True, kinds=(FrameKind.OPEN,)),
    }
    return _limits(spec, spec.stage, (FrameKind.OPEN, FrameKind.ACTIVATION, FrameKind.RELEASE), tensors)


def source_limits(spec: LoadStage) -> FrameLimits:
    """What the link from the head back to the source may carry."""
    ids = TensorLimit(("I64",), 1, per_segment=True, required=True, kinds=(FrameKind.TOKEN,))
    return _limits(spec, spec.stages, (FrameKind.TOKEN, FrameKind.RELEASE), {"ids": ids})


def _limits(
    spec: LoadStage, stage: int, kinds: tuple[FrameKind, ...], tensors: dict[str, TensorLimit]
) -> FrameLimits:
    reason = TensorLimit(("U8",), 1, max_elements=MAX_REASON_BYTES, kinds=(FrameKind.RELEASE,))
    return FrameLimits(
        deployment=spec.deployment,
        epoch=spec.epoch,
        stage=stage,
        kinds=kinds,
        max_segments=spec.micro_batch,
        slots=spec.slots,
        context=spec.context,
        max_tokens=max(spec.chunk, spec.micro_batch),
        tensors={**tensors, "reason": reason},
    )


def _starts(pieces: Sequence[Piece]) -> list[int]:
    """Where the rows of each piece but the first begin."""
    return list(accumulate(piece.length for piece in pieces))[:-1]


def _segments(pieces: Sequence[Piece]) -> tuple[FrameSegment, ...]:
    return tuple(
        FrameSegment(piece.sequence, piece.slot, piece.position, piece.length, SAMPLE if piece.sample else 0)
        for piece in pieces
    )


def _pieces(frame: Frame) -> list[Piece]:
    return [Piece(at.sequence, at.slot, at.position, at.length, bool(at.flags & SAMPLE), None) for at in frame.segments]


def _tensor(name: str, array: Tensor) -> NamedTensor:
    """A view of the array's memory."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # numpy exports no buffer of bfloat16
    return NamedTensor(name, _NAMES[array.dtype], array.shape, flat.data)


def _read(tensor: NamedTensor) -> Tensor:
    """A view of the frame's memory."""
    return np.frombuffer(tensor.data, FILE_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _sampling_tensors(sampling: Sampling) -> tuple[NamedTensor, ...]:
    *numbers, seed = astuple(sampling)
    return (
        NamedTensor.of("sampling", "F64", (1, 7), _SAMPLING.pack(*numbers)),
        NamedTensor.of("seed", "I64", (1,), struct.pack("<q", seed)),
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
