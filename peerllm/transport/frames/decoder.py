"""Bytes to frame, checked against the plan field by field. Payloads stay views into the buffer: nothing is copied."""

from __future__ import annotations

from math import prod

from peerllm.transport.frames.frame import (
    DTYPES_BY_CODE,
    ITEM_BYTES,
    Frame,
    FrameKind,
    NamedTensor,
)
from peerllm.transport.frames.layout import (
    HEADER,
    KIND_AT,
    MAGIC,
    MASKED,
    RUN,
    SAMPLE,
    SIZE,
    SNAPSHOT,
    TENSOR,
    VERSION,
    padding,
)
from peerllm.transport.frames.limits import FrameLimits, FrameRefused, Rule, TensorLimit
from peerllm.transport.frames.token_run import TokenRun

BOOL_CHUNK_BYTES = 1 << 16  # truth values are looked at in pieces, so that checking takes no memory


def kind_of(buffer: bytes | bytearray) -> int:
    """What a frame says it is, unchecked; 0 for what is too short to say anything."""
    return buffer[KIND_AT] if len(buffer) > KIND_AT else 0


def decode(buffer: bytes | bytearray | memoryview, limits: FrameLimits) -> Frame:
    """The frame in `buffer`, whose tensors are views of it; FrameRefused (a FrameError) if it breaks a rule."""
    view = memoryview(buffer).cast("B")
    if len(view) > limits.max_bytes:
        raise FrameRefused(Rule.TOO_LARGE, f"{len(view)} bytes, at most {limits.max_bytes}")
    if len(view) < HEADER.size:
        raise FrameRefused(Rule.TRUNCATED, f"{len(view)} bytes")
    magic, version, code, stage, epoch, deployment, run_count, tensor_count, header_bytes, reserved = (
        HEADER.unpack_from(view)
    )
    if magic != MAGIC:
        raise FrameRefused(Rule.MAGIC)
    if version != VERSION:
        raise FrameRefused(Rule.VERSION, f"{version}, this is {VERSION}")
    if reserved:
        raise FrameRefused(Rule.RESERVED)
    kind = _kind(code, limits)
    if deployment.hex() != limits.deployment:
        raise FrameRefused(Rule.DEPLOYMENT, deployment.hex())
    if epoch != limits.epoch:
        raise FrameRefused(Rule.EPOCH, f"{epoch}, the plan's is {limits.epoch}")
    if stage != limits.stage:
        raise FrameRefused(Rule.STAGE, f"{stage}, this is {limits.stage}")
    if not run_count:
        raise FrameRefused(Rule.NO_RUNS)
    if run_count > limits.max_runs:
        raise FrameRefused(Rule.RUNS, f"{run_count}, at most {limits.max_runs}")
    if tensor_count > len(limits.tensors):
        raise FrameRefused(Rule.TENSORS, f"{tensor_count}, at most {len(limits.tensors)}")
    if header_bytes > len(view):
        raise FrameRefused(Rule.TRUNCATED, f"a header of {header_bytes} bytes in {len(view)}")
    head = view[:header_bytes]
    if HEADER.size + run_count * RUN.size > header_bytes:
        raise FrameRefused(Rule.HEADER_BYTES, f"{header_bytes} bytes for {run_count} runs")
    runs = _runs(head, run_count, kind, limits)
    tokens = sum(run.length for run in runs)
    if tokens > limits.max_tokens:
        raise FrameRefused(Rule.TOKENS, f"{tokens}, at most {limits.max_tokens}")
    table = _table(head, HEADER.size + run_count * RUN.size, tensor_count)
    shapes = _check_tensors(table, kind, tokens, run_count, limits)
    return Frame(kind, limits.deployment, epoch, stage, runs, _payloads(view, header_bytes, shapes))


def _kind(code: int, limits: FrameLimits) -> FrameKind:
    for kind in limits.kinds:
        if kind == code:
            return kind
    raise FrameRefused(Rule.KIND, str(code))


def _runs(head: memoryview, count: int, kind: FrameKind, limits: FrameLimits) -> tuple[TokenRun, ...]:
    runs = []
    slots = set()
    table = head[HEADER.size : HEADER.size + count * RUN.size]
    for sequence, slot, position, length, flags, after in RUN.iter_unpack(table):
        if slot >= limits.slots:
            raise FrameRefused(Rule.SLOT, f"{slot} of {limits.slots}")
        if slot in slots:
            raise FrameRefused(Rule.SLOT_TWICE, str(slot))
        if not length and kind is FrameKind.ACTIVATION:
            raise FrameRefused(Rule.EMPTY_RUN, f"slot {slot}")
        if position + length > limits.context:
            raise FrameRefused(Rule.CONTEXT, f"{position} + {length} tokens of {limits.context}")
        if flags & ~(SAMPLE | SNAPSHOT | MASKED):
            raise FrameRefused(Rule.FLAGS, f"{flags:#x}")
        slots.add(slot)
        sample, snapshot = bool(flags & SAMPLE), bool(flags & SNAPSHOT)
        runs.append(TokenRun(sequence, slot, position, length, sample, snapshot, after - 1, bool(flags & MASKED)))
    return tuple(runs)


def _table(head: memoryview, at: int, count: int) -> list[tuple[bytes, int, tuple[int, ...]]]:
    """(name, dtype code, shape) of each tensor; the table must fill the header to its last byte."""
    table = []
    for _ in range(count):
        if at + TENSOR.size > len(head):
            raise FrameRefused(Rule.HEADER_BYTES, "the tensor table is cut off")
        name_bytes, code, rank, reserved = TENSOR.unpack_from(head, at)
        at += TENSOR.size
        if reserved:
            raise FrameRefused(Rule.RESERVED)
        if at + rank * SIZE.size + name_bytes > len(head):
            raise FrameRefused(Rule.HEADER_BYTES, "the tensor table is cut off")
        shape = tuple(size for (size,) in SIZE.iter_unpack(head[at : at + rank * SIZE.size]))
        at += rank * SIZE.size
        table.append((bytes(head[at : at + name_bytes]), code, shape))
        at += name_bytes
    if at + padding(at) != len(head):
        raise FrameRefused(Rule.HEADER_BYTES, f"{len(head)}, the contents have {at + padding(at)}")
    if any(head[at:]):
        raise FrameRefused(Rule.PADDING, "in the header")
    return table


def _check_tensors(
    table: list[tuple[bytes, int, tuple[int, ...]]], kind: FrameKind, tokens: int, runs: int, limits: FrameLimits
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape by name, in the frame's order."""
    checked: dict[str, tuple[str, tuple[int, ...]]] = {}
    for raw, code, shape in table:
        name = raw.decode("ascii", "replace")
        limit = limits.tensors.get(name)
        if limit is None or not limit.applies(kind):
            raise FrameRefused(Rule.NAME, repr(name))
        if name in checked:
            raise FrameRefused(Rule.NAME_TWICE, name)
        dtype = DTYPES_BY_CODE.get(code, "")
        if dtype not in limit.dtypes:
            raise FrameRefused(Rule.DTYPE, f"{name} is {dtype or code}, not {'/'.join(limit.dtypes)}")
        _check_shape(name, shape, limit, tokens, runs)
        checked[name] = dtype, shape
    for name, limit in limits.tensors.items():
        if limit.required and limit.applies(kind) and name not in checked:
            raise FrameRefused(Rule.MISSING, name)
    return checked


def _check_shape(name: str, shape: tuple[int, ...], limit: TensorLimit, tokens: int, runs: int) -> None:
    if len(shape) != limit.rank:
        raise FrameRefused(Rule.RANK, f"{name} has {len(shape)} dimensions, not {limit.rank}")
    if limit.last_dim is not None and shape[-1] != limit.last_dim:
        raise FrameRefused(Rule.SHAPE, f"{name} is {shape}, the last dimension is {limit.last_dim}")
    if limit.per_token and shape[0] != tokens:
        raise FrameRefused(Rule.ROWS, f"{name} has {shape[0]} rows for {tokens} tokens")
    if limit.per_run and shape[0] != runs:
        raise FrameRefused(Rule.ROWS, f"{name} has {shape[0]} rows for {runs} runs")
    if 0 in shape:
        raise FrameRefused(Rule.SHAPE, f"{name} is {shape}, a dimension is at least 1")
    if limit.max_elements is not None and prod(shape) > limit.max_elements:
        raise FrameRefused(Rule.ELEMENTS, f"{name} is {shape}, at most {limit.max_elements} elements")


def _payloads(view: memoryview, at: int, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[NamedTensor, ...]:
    sizes = [prod(shape) * ITEM_BYTES[dtype] for dtype, shape in shapes.values()]
    expected = at + sum(size + padding(size) for size in sizes)
    if expected != len(view):
        raise FrameRefused(Rule.LENGTH, f"{len(view)} bytes, its tensors say {expected}")
    tensors = []
    for (name, (dtype, shape)), size in zip(shapes.items(), sizes, strict=True):
        data = view[at : at + size]
        at += size + padding(size)
        if any(view[at - padding(size) : at]):
            raise FrameRefused(Rule.PADDING, f"after {name}")
        if dtype == "BOOL":
            _check_truth(name, data)
        tensors.append(NamedTensor(name, dtype, shape, data))
    return tuple(tensors)


def _check_truth(name: str, data: memoryview) -> None:
    for start in range(0, len(data), BOOL_CHUNK_BYTES):
        if data[start : start + BOOL_CHUNK_BYTES].tobytes().strip(b"\0\1"):
            raise FrameRefused(Rule.BOOL, name)
