"""Matrices of 8-bit floats with scales for tiles, rows or the whole. They have no whole-number form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from peerllm.engine.weights.formats.coded_rows import CodedRows, Floats, Rows, StoredTensors
from peerllm.engine.weights.formats.grouped_form import base_name, held
from peerllm.errors import ModelError

FLOATS8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


@dataclass(frozen=True, slots=True)
class FP8Form:
    """Implements WeightForm. `tile`: rows and columns that share a scale; None: all of them."""

    scale: str  # the name of the scales' tensor after the layer's
    tile: tuple[int | None, int | None]
    sides: int = 2  # dimensions of the scales' tensor

    bits, block, zeros, minima, ordered = 0, 0, False, False, False

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{base_name(name)}.weight", (rows, columns)
        yield f"{base_name(name)}.{self.scale}", self._shape(rows, columns)

    def coded(self, tensors: StoredTensors, name: str, rows: Rows) -> CodedRows:
        raise ModelError(f"tensor {name} holds 8-bit floats, which have no whole-number form")

    def floats(self, tensors: StoredTensors, name: str, rows: Rows) -> Floats:
        base = base_name(name)
        stored = tensors.stored(f"{base}.weight")
        if stored.dtype not in FLOATS8 or stored.ndim != 2:
            raise ModelError(f"tensor {base}.weight is {stored.dtype}, not 8-bit floats as config.json says")
        count, columns = stored.shape
        scales = held(tensors, f"{base}.{self.scale}", "float", self._shape(count, columns)).astype(np.float32)
        down, across = self.tile
        numbers = np.arange(count)[rows] // (down or count)
        made = np.asarray(stored[rows]).astype(np.float32)
        some = scales.reshape(_tiles(count, down), _tiles(columns, across))[numbers]
        made *= np.repeat(some, min(across or columns, columns), axis=1)[:, :columns]
        return made

    def _shape(self, rows: int, columns: int) -> tuple[int, ...]:
        down, across = self.tile
        full = (_tiles(rows, down), _tiles(columns, across))
        return full[: self.sides]


def _tiles(size: int, tile: int | None) -> int:
    return 1 if tile is None else -(-size // tile)
