"""Random tensors in GGML's block types, and what the gguf library reads from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from peerllm.engine.messages import TensorAt
from peerllm.stored_types import STORED_TYPES

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
HALVES = {  # where a block has float16 numbers
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (),
}  # fmt: skip
SIZES = {"Q8_0": 1e-3, "Q3_K": 3e-4, "Q6_K": 2e-5, "IQ4_NL": 1e-3, "IQ4_XS": 5e-5, "Q4_K": 1e-3, "Q5_K": 1e-3}


def blocks_of(kind: str, rows: int, columns: int, seed: int = 0) -> Bytes:
    """A matrix of random codes and scales as its file holds it: [rows, bytes of a row]."""
    rng = np.random.default_rng([seed, *kind.encode()])
    numbers, size = STORED_TYPES[kind]
    made = rng.integers(0, 256, (rows, columns // numbers, size), np.uint8)
    for start in HALVES[kind]:
        scales = rng.standard_normal((rows, columns // numbers, 1)) * SIZES.get(kind, 0.02)
        made[:, :, start : start + 2] = scales.astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        made[:, :, 0] = rng.integers(115, 122, made.shape[:2])
    return made.reshape(rows, -1)


def read(kind: str, blocks: Bytes) -> Floats:
    """The numbers in float32, as the gguf library reads them."""
    return np.asarray(dequantize(blocks, GGMLQuantizationType[kind]), np.float32)


class File:
    """A file of tensors, each at a place of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.tensors, self._end = path, list[TensorAt](), 0

    def add(self, name: str, kind: str, shape: tuple[int, ...], data: npt.NDArray[np.generic]) -> None:
        with self.path.open("ab") as file:
            file.write(data.tobytes())
        self.tensors.append(TensorAt(name, kind, shape, str(self.path), self._end, data.nbytes))
        self._end += data.nbytes
