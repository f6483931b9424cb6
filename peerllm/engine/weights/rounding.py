"""Rounding weights to whole numbers, with one scale for each block of neighbours in a row (as GGML's Q4_0, Q8_0)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCKS = (128, 64, 32)  # weights that share a scale: the first that divides a row's length
PIECE_BYTES = 1 << 19  # of float32 rows rounded at once, so that they stay in the processor's cache
SESSION_BYTES = 160 << 10  # onnxruntime's overhead for one matrix of any size
BLOCK_BYTES = 12  # onnxruntime keeps a block's scale twice, and the sum of its codes
LEAST = 1e-37  # smaller weights become zero, since their scale has no finite reciprocal
MAGIC = 1.5 * 2**23  # float32: adding to it rounds a number to a whole one, in the sum's last bits


def block_of(columns: int) -> int | None:
    """How many weights share a scale; None if matrices with so many columns are not rounded."""
    return next((block for block in BLOCKS if columns % block == 0), None)


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """Memory of a rounded matrix: its codes and scales, and the session that multiplies with it."""
    block = block_of(columns)
    assert block is not None
    return rows * columns * bits // 8 + rows * (columns // block) * BLOCK_BYTES + SESSION_BYTES


def rounded(rows: NDArray[Any], bits: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round rows [n, columns] of any float type: codes, and float32 scales [n, columns / block].

    Codes are uint8: [n, columns], or of 4 bits [n, columns / 2], two in a byte, the first in the lower half.
    weight ≈ (code - zero) · scale, where zero is 2^(bits-1). There is one code more below zero than above, so the scale
    (which may be negative) maps the weight of the largest magnitude to code 0.
    """
    count, columns = rows.shape
    codes = np.empty((count, columns * bits // 8), np.uint8)
    scales = np.empty((count, columns // block), np.float32)
    zero = 1 << (bits - 1)
    step = max(1, PIECE_BYTES // (4 * columns))
    with np.errstate(all="ignore"):  # a weight may be infinite, or no number
        for start in range(0, count, step):
            some = rows[start : start + step].astype(np.float32, order="C").reshape(-1, block)
            scale = _largest(some) / np.float32(-zero)
            inverse = np.where(np.abs(scale) * zero < LEAST, np.float32(0), 1 / scale)
            np.multiply(some, inverse[:, None], out=some)
            some += np.float32(MAGIC + zero)
            np.minimum(some, np.float32(MAGIC + 2 * zero - 1), out=some)
            code = some.view(np.uint32).astype(np.uint8).reshape(-1, columns)
            codes[start : start + step] = nibbles(code) if bits == 4 else code
            scales[start : start + step] = scale.reshape(-1, columns // block)
    return codes, scales


def _largest(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each block's weight of the largest magnitude, with its sign; the first of equals."""
    high, low = blocks.reshape(-1), blocks.reshape(-1)
    while len(high) > len(blocks):  # halves the array: numpy's own reduction of short rows is four times slower
        high, low = np.maximum(high[0::2], high[1::2]), np.minimum(low[0::2], low[1::2])
    largest = np.where(high > -low, high, low)
    both = np.flatnonzero(high == -low)
    largest[both] = blocks[both, np.abs(blocks[both]).argmax(axis=1)]
    return largest


def halves(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The reverse of `nibbles`: the two 4-bit codes of each byte, [..., 2 · bytes]."""
    return np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], -1)


def nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit codes in a byte, the first in the lower half: [rows, columns / 2]."""
    pairs = codes.view("<u2")
    together: NDArray[np.uint8] = (pairs | (pairs >> 4)).astype(np.uint8)
    return together
