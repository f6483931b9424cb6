"""One plan's limits, frames within them, and frames with fields changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from hypothesis import strategies as st

from peerllm.transport.frames.encoder import encode_buffers
from peerllm.transport.frames.frame import DTYPE_CODES, ITEM_BYTES, Frame, FrameKind, NamedTensor
from peerllm.transport.frames.layout import HEADER, RUN, TENSOR, padding
from peerllm.transport.frames.limits import FrameLimits, TensorLimit
from peerllm.transport.frames.token_run import TokenRun

DEPLOYMENT = "0123456789abcdef" * 2
HIDDEN = 12
LIMITS = FrameLimits(
    deployment=DEPLOYMENT,
    epoch=7,
    stage=2,
    kinds=(FrameKind.ACTIVATION, FrameKind.OPEN, FrameKind.RELEASE),
    max_runs=4,
    slots=6,
    context=64,
    max_tokens=16,
    tensors={
        "hidden": TensorLimit(("F32", "BF16"), 2, HIDDEN, per_token=True, required=True, kinds=(FrameKind.ACTIVATION,)),
        "mask": TensorLimit(("BOOL",), 2, 5, per_run=True),
        "extra": TensorLimit(("U8", "I64"), 1, max_elements=24),
        "scale": TensorLimit(("F64",), 0),
    },
)


def encode(frame: Frame) -> bytes:
    """The whole frame as one string of bytes."""
    return b"".join(encode_buffers(frame))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """Any frame that LIMITS allows."""
    kind = draw(st.sampled_from(LIMITS.kinds))
    slots = draw(st.lists(st.integers(0, LIMITS.slots - 1), min_size=1, max_size=LIMITS.max_runs, unique=True))
    runs = []
    for slot in slots:
        length = draw(st.integers(1 if kind is FrameKind.ACTIVATION else 0, LIMITS.max_tokens // LIMITS.max_runs))
        position = draw(st.integers(0, LIMITS.context - length))
        flags = draw(st.booleans()), draw(st.booleans())
        runs.append(TokenRun(draw(st.integers(0, 2**64 - 1)), slot, position, length, *flags))
    tokens = sum(each.length for each in runs)
    tensors = []
    if kind is FrameKind.ACTIVATION:
        tensors.append(_tensor(draw, "hidden", draw(st.sampled_from(["F32", "BF16"])), (tokens, HIDDEN)))
    if draw(st.booleans()):
        data = draw(st.lists(st.integers(0, 1), min_size=5 * len(runs), max_size=5 * len(runs)))
        tensors.append(NamedTensor.of("mask", "BOOL", (len(runs), 5), bytes(data)))
    if draw(st.booleans()):
        dtype = draw(st.sampled_from(["U8", "I64"]))
        tensors.append(_tensor(draw, "extra", dtype, (draw(st.integers(1, 24)),)))
    if draw(st.booleans()):
        tensors.append(_tensor(draw, "scale", "F64", ()))
    return Frame(kind, DEPLOYMENT, LIMITS.epoch, LIMITS.stage, tuple(runs), tuple(draw(st.permutations(tensors))))


def _tensor(draw: st.DrawFn, name: str, dtype: str, shape: tuple[int, ...]) -> NamedTensor:
    size = prod(shape) * ITEM_BYTES[dtype]
    start = draw(st.integers(0, 255))
    return NamedTensor.of(name, dtype, shape, bytes((start + at) % 256 for at in range(size)))


@dataclass(frozen=True)
class Field:
    """Where one field of an encoded frame lies."""

    at: int
    size: int


HEADER_FIELDS = [Field(0, 4), Field(4, 1), Field(5, 1), Field(6, 2), Field(8, 4), Field(12, 16), Field(28, 2)]
HEADER_FIELDS += [Field(30, 2), Field(32, 4), Field(36, 4)]


def fields_of(frame: Frame) -> list[Field]:
    """Every field of the frame's bytes, padding and a byte of each payload included."""
    fields = list(HEADER_FIELDS)
    at = HEADER.size
    for _ in frame.runs:
        fields += [Field(at, 8), *(Field(at + 8 + 4 * number, 4) for number in range(4))]
        at += RUN.size
    for tensor in frame.tensors:
        fields += [Field(at + number, 1) for number in range(4)]
        at += TENSOR.size
        fields += [Field(at + 4 * number, 4) for number in range(len(tensor.shape))]
        at += 4 * len(tensor.shape)
        fields.append(Field(at, len(tensor.name)))
        at += len(tensor.name)
    fields += [Field(at, 1)] * bool(padding(at))
    at += padding(at)
    for tensor in frame.tensors:
        fields.append(Field(at + tensor.data.nbytes - 1, 1))
        at += tensor.data.nbytes
        fields += [Field(at, 1)] * bool(padding(at))
        at += padding(at)
    return fields


@st.composite
def changed_frames(draw: st.DrawFn) -> bytes:
    """A valid frame's bytes with one to three fields changed, or its parts rearranged."""
    frame = draw(frames())
    for _ in range(draw(st.integers(0, 1))):
        frame = draw(st.sampled_from(REARRANGEMENTS))(frame)
    data = bytearray(encode(frame))
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 7)) == 0:
            longer = data + bytes(draw(st.sampled_from([1, 8, LIMITS.max_bytes])))
            data = draw(st.sampled_from([data[: draw(st.integers(0, len(data)))], longer]))
            continue
        field = draw(st.sampled_from(fields_of(frame)))
        if field.at + field.size > len(data):
            continue
        now = int.from_bytes(data[field.at : field.at + field.size], "little")
        top = 256**field.size - 1
        near = st.sampled_from([0, 1, max(now - 1, 0), min(now + 1, top), top, top >> 1, now ^ 1])
        value = draw(near | st.integers(0, top))
        data[field.at : field.at + field.size] = value.to_bytes(field.size, "little")
    return bytes(data)


def _twice(frame: Frame) -> Frame:
    return replace(frame, tensors=(*frame.tensors, *frame.tensors[:1]))


def _without(frame: Frame) -> Frame:
    return replace(frame, tensors=frame.tensors[1:])


def _flat(frame: Frame) -> Frame:
    flat = [NamedTensor.of(t.name, t.dtype, (prod(t.shape), 1, 1), t.data) for t in frame.tensors[:1]]
    return replace(frame, tensors=(*flat, *frame.tensors[1:]))


def _other_dtype(frame: Frame) -> Frame:
    other = [NamedTensor.of(t.name, "I8", (t.data.nbytes,), t.data) for t in frame.tensors[:1]]
    return replace(frame, tensors=(*other, *frame.tensors[1:]))


def _same_slot(frame: Frame) -> Frame:
    return replace(frame, runs=(*frame.runs, frame.runs[0])[: LIMITS.max_runs])


def _untrue(frame: Frame) -> Frame:
    count = len(frame.runs)
    mask = NamedTensor.of("mask", "BOOL", (count, 5), bytes(5 * count - 1) + b"\2")
    return replace(frame, tensors=(*(t for t in frame.tensors if t.name != "mask"), mask))


def _too_many_tokens(frame: Frame) -> Frame:
    return replace(frame, runs=(replace(frame.runs[0], position=0, length=17), *frame.runs[1:]))


def _empty_run(frame: Frame) -> Frame:
    return replace(frame, runs=(replace(frame.runs[0], length=0), *frame.runs[1:]))


REARRANGEMENTS = [_twice, _without, _flat, _other_dtype, _same_slot, _untrue, _too_many_tokens, _empty_run]
assert set(DTYPE_CODES) == set(ITEM_BYTES)
