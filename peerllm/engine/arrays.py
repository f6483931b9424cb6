"""numpy arrays and torch tensors of one memory, in each dtype that shards compute in."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array's own memory, or a copy: torch knows none that must not be written to."""
    own = np.require(array, requirements=("C", "W"))
    if own.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """The memory of a tensor of the processor's."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array
