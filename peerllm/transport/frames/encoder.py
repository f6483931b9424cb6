"""Frame to bytes."""

from __future__ import annotations

from struct import error as StructError

from peerllm.transport.frames.frame import DTYPE_CODES, MAX_U16, MAX_U32, Frame
from peerllm.transport.frames.layout import HEADER, MAGIC, RUN, SIZE, TENSOR, VERSION, padding


def encode(frame: Frame) -> bytes:
    """The whole frame as one string of bytes; payloads are copied once."""
    return b"".join(encode_buffers(frame))


def encode_buffers(frame: Frame) -> list[bytes | memoryview]:
    """The frame as header, payload, padding, ...; payloads are not copied. ValueError if a field does not fit."""
    if not 0 <= frame.epoch <= MAX_U32 or not 0 <= frame.stage <= MAX_U16:
        raise ValueError(f"epoch {frame.epoch} or stage {frame.stage} does not fit its field")
    if max(len(frame.runs), len(frame.tensors)) > MAX_U16:
        raise ValueError(f"{len(frame.runs)} runs and {len(frame.tensors)} tensors do not fit one frame")
    deployment = bytes.fromhex(frame.deployment)
    if len(deployment) != 16:
        raise ValueError(f"deployment {frame.deployment!r} is not 32 hex digits")
    table = bytearray()
    for run in frame.runs:
        try:
            table += RUN.pack(run.sequence, run.slot, run.position, run.length, run.sample)
        except StructError as error:
            raise ValueError(f"{run} does not fit its fields") from error
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
    buffers: list[bytes | memoryview] = [header + table]
    for tensor in frame.tensors:
        buffers.append(tensor.data)
        if pad := padding(tensor.data.nbytes):
            buffers.append(bytes(pad))
    return buffers
