"""Arrays as tensors of frames and back, without copies."""

from __future__ import annotations

import numpy as np

from peerllm.engine.base import Tensor
from peerllm.engine.weights.checkpoint import FILE_DTYPES
from peerllm.transport.frames.frame import NamedTensor

DTYPE_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}


def to_tensor(name: str, array: Tensor) -> NamedTensor:
    """A view of the array's memory."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # numpy exports no buffer of bfloat16
    return NamedTensor(name, DTYPE_NAMES[array.dtype], array.shape, flat.data)


def to_array(tensor: NamedTensor) -> Tensor:
    """A view of the frame's memory."""
    return np.frombuffer(tensor.data, FILE_DTYPES[tensor.dtype]).reshape(tensor.shape)
