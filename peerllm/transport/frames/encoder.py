"""Frame to bytes."""

from __future__ import annotations

from struct import error as StructError

from peerllm.transport.frames.frame import DTYPE_CODES, Frame
from peerllm.transport.frames.layout import HEADER, MAGIC, MASKED, RUN, SAMPLE, SIZE, SNAPSHOT, TENSOR, VERSION, padding


def encode_buffers(frame: Frame) -> list[bytes | memoryview]:
    """The frame as header, payload, padding, ...; payloads are not copied. ValueError if a field does not fit."""
    try:
        buffers: list[bytes | memoryview] = [_head(frame)]
    except StructError as error:
        raise ValueError(f"a field of a frame for stage {frame.stage} does not fit: {error}") from error
    for tensor in frame.tensors:
        buffers.append(tensor.data)
        if pad := padding(tensor.data.nbytes):
            buffers.append(bytes(pad))
    return buffers


def _head(frame: Frame) -> bytes:
    deployment = bytes.fromhex(frame.deployment)
    if len(deployment) != 16:
        raise ValueError(f"deployment {frame.deployment!r} is not 32 hex digits")
    table = bytearray()
    for run in frame.runs:
        flags = SAMPLE * run.sample | SNAPSHOT * run.snapshot | MASKED * run.masked
        table += RUN.pack(run.sequence, run.slot, run.position, run.length, flags, run.through + 1)
    for tensor in frame.tensors:
        name = tensor.name.encode("ascii")
        table += TENSOR.pack(len(name), DTYPE_CODES[tensor.dtype], len(tensor.shape), 0)
        for size in tensor.shape:
            table += SIZE.pack(size)
        table += name
    table += bytes(padding(HEADER.size + len(table)))
    header = HEADER.pack(
        MAGIC,
        VERSION,
        frame.kind,
        frame.stage,
        frame.epoch,
        deployment,
        len(frame.runs),
        len(frame.tensors),
        HEADER.size + len(table),
        0,
    )
    return header + table
