"""Hidden states for a slow link: a token's numbers as int8, in steps of 1/127 of the largest among them.

Each token has a scale of its own, so a row is right whatever else is in its batch. A number comes back at most half a
step off; rounding it to the compute dtype, which could hold the number sent, adds at most another half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.engine.base import Floats, Tensor

STEPS = np.float32(127)  # of a token's largest number, on either side of 0
LEAST = np.finfo(np.float32).tiny  # of a scale: rows of zeros have one, and it has a reciprocal


def quantise(hidden: Tensor) -> tuple[npt.NDArray[np.int8], Floats]:
    """Floats [n, hidden] to int8 [n, hidden] and each row's scale, float32 [n].

    The scale of a row that holds a number that is not finite is not finite either.
    """
    numbers: Floats = hidden.astype(np.float32)
    scales: Floats = np.maximum(np.abs(numbers).max(1) / STEPS, LEAST)
    with np.errstate(invalid="ignore"):  # the caller leaves out rows that are not finite
        return np.rint(numbers / scales[:, None]).astype(np.int8), scales


def dequantise(values: npt.NDArray[np.int8], scales: Floats, dtype: np.dtype[Any]) -> Tensor:
    """What `quantise` was given, to within a step; `values` int8 [n, hidden], `scales` float32 [n]."""
    return (values * scales[:, None]).astype(dtype, copy=False)
