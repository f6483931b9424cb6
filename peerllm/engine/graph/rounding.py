"""Weights to whole numbers: symmetric, a scale for each block of neighbours in a row (as GGML's Q4_0 and Q8_0 do)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCKS = (128, 32)  # weights that share a scale: the first that divides a row's length


def block_of(columns: int) -> int | None:
    """How many weights share a scale; None: such a matrix is not rounded."""
    return next((block for block in BLOCKS if columns % block == 0), None)


def rounded(rows: npt.NDArray[np.float32], bits: int, block: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Codes uint8 [rows, columns · bits / 8], of 4 bits the first in the lower half, and scales [rows, blocks].

    weight ≈ (code - zero) · scale, with a zero of 2^(bits-1). The scale maps the weight of the largest magnitude, with
    its sign, to the least code: the range is used to its end, which has one code more.
    """
    count, columns = rows.shape
    zero = 1 << (bits - 1)
    some = rows.reshape(count, columns // block, block)
    high, low = some.max(2), some.min(2)
    scales = np.where(high > -low, high, low) / np.float32(-zero)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    made = some * inverse[:, :, None]
    np.rint(made, out=made)
    made += zero
    np.clip(made, 0, 2 * zero - 1, out=made)
    codes = made.astype(np.uint8).reshape(count, columns)
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes, scales
