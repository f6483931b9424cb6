"""Where each field lies (docs/wire.md §4). Little-endian throughout."""

from __future__ import annotations

from struct import Struct

MAGIC = b"PLFR"
VERSION = 2
ALIGNMENT = 8  # bytes; header and every payload end on a multiple

# magic, version, kind, stage, epoch, deployment, runs, tensors, header bytes, reserved (0)
HEADER = Struct("<4sBBHI16sHHII")
KIND_AT = 5
RUN = Struct("<QIIIHH")  # sequence, slot, position, length, flags, 1 + the last layer that computes it (0: all do)
SAMPLE, SNAPSHOT, MASKED = 1, 2, 4  # flags of a run
TENSOR = Struct("<BBBB")  # name bytes, dtype code, rank, reserved (0); then rank sizes, then the name
SIZE = Struct("<I")


def padding(length: int) -> int:
    """Zero bytes that follow `length` bytes."""
    return -length % ALIGNMENT
