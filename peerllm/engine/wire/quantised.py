"""Hidden states for a slow link: a token's numbers as int8, in steps of 1/127 of the largest among them.

One scale per token and nothing else: a row is right by itself, whatever it is computed with, and what comes back is at
most half a step off, before it is brought to the compute dtype (which is one that holds the number sent: at most a
step).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.engine.base import Floats, Tensor

STEPS = np.float32(127)  # of a token's largest number, on either side of 0
LEAST = np.finfo(np.float32).tiny  # of a scale: rows of zeros have one, and it has a reciprocal


def rounded(hidden: Tensor) -> tuple[npt.NDArray[np.int8], Floats]:
    """Floats [n, hidden] to int8 [n, hidden] and each row's scale, float32 [n].

    The scale of a row that holds a number that is not finite is not finite either.
    """
    numbers: Floats = hidden.astype(np.float32)
    scales: Floats = np.maximum(np.abs(numbers).max(1) / STEPS, LEAST)
    with np.errstate(invalid="ignore"):  # rows that are not finite are not sent
        return np.rint(numbers / scales[:, None]).astype(np.int8), scales


def restored(values: npt.NDArray[np.int8], scales: Floats, dtype: np.dtype[Any]) -> Tensor:
    """What `rounded` was given, as far as that can be told."""
    return (values * scales[:, None]).astype(dtype, copy=False)
