"""Experts as gpt-oss stores them: 4-bit floats, 32 of which share a power of two; each is half of a whole number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peerllm.engine.weights.formats.coded_rows import CodedRows, Floats, Rows, StoredTensors
from peerllm.engine.weights.formats.ggml_blocks import MXFP4
from peerllm.engine.weights.formats.grouped_form import held
from peerllm.engine.weights.rounding import halves
from peerllm.errors import ModelError

BLOCK = 32
BIAS = 128  # of the exponents: 127, and one for the doubling
UNDEFINED = 255  # an exponent that stands for no number
# The two codes of a byte, as one number, which is looked up ten times as fast as two.
_PAIRS = (MXFP4.view(np.uint8) ^ np.uint8(128))[halves(np.arange(256, dtype=np.uint8)[:, None])].view(np.uint16)


@dataclass(frozen=True, slots=True)
class MXFP4Form:
    """Implements WeightForm for a stack of `count` matrices, the rows of all counted through."""

    count: int

    bits, block, zeros, minima, ordered = 8, BLOCK, False, False, False

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        if columns % BLOCK:
            raise ModelError(f"{name}: rows of {columns} weights cannot be divided into blocks of {BLOCK}")
        shape = (self.count, rows // self.count, columns // BLOCK)
        yield f"{name}_blocks", (*shape, BLOCK // 2)
        yield f"{name}_scales", shape

    def coded(self, tensors: StoredTensors, name: str, rows: Rows) -> CodedRows:
        blocks = held(tensors, f"{name}_blocks", "uint8", (self.count, None, None, BLOCK // 2))
        powers = held(tensors, f"{name}_scales", "uint8", blocks.shape[:3])
        powers = powers.reshape(-1, powers.shape[2])[rows]
        if (powers == UNDEFINED).any():
            raise ModelError(f"tensor {name}_scales holds exponents that stand for no number; fetch the file again")
        some = blocks.reshape(-1, *blocks.shape[2:])[rows]
        scales = np.ldexp(np.float32(1), powers.astype(np.int32) - BIAS)
        return CodedRows(
            8, BLOCK, np.take(_PAIRS, some).view(np.uint8).reshape(len(some), -1), scales.astype(np.float32)
        )

    def floats(self, tensors: StoredTensors, name: str, rows: Rows) -> Floats:
        return self.coded(tensors, name, rows).floats()
