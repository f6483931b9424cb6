"""Matrices as compressed-tensors stores them: signed whole numbers, packed into words or one in a byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peerllm.engine.weights.formats.coded_rows import Rows, StoredTensors
from peerllm.engine.weights.formats.grouped_form import Codes, GroupedForm, Groups, held, unpacked


@dataclass(frozen=True, slots=True)
class CompressedForm(GroupedForm):
    """`words`: numbers are packed ("pack-quantized"), else int8 ("int-quantized"); `single`: one scale for a matrix."""

    words: bool = True
    packed_zeros: bool = True  # zeros are packed along the rows, else int8
    single: bool = False

    def named(self, base: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        groups = self.groups(columns)
        if self.words:
            yield f"{base}.weight_packed", (rows, columns * self.bits // 32)
        else:
            yield f"{base}.weight", (rows, columns)
        yield f"{base}.weight_scale", (1,) if self.single else (rows, groups)
        if self.zeros:
            yield f"{base}.weight_zero_point", self._zeros_shape(rows, groups)
        if self.ordered:
            yield f"{base}.weight_g_idx", (columns,)

    def read(self, tensors: StoredTensors, base: str, rows: Rows) -> Groups:
        if self.words:
            stored = held(tensors, f"{base}.weight_packed", "int32", (None, None))
            columns = stored.shape[1] * 32 // self.bits
            codes = np.ascontiguousarray(stored[rows]).astype("<i4", copy=False).view(np.uint8)
        else:
            stored = held(tensors, f"{base}.weight", "int8", (None, None))
            columns = stored.shape[1]
            codes = stored[rows].view(np.uint8) ^ np.uint8(128)
        count, groups = len(stored), self.groups(columns)
        scales = held(tensors, f"{base}.weight_scale", "float", (1,) if self.single else (count, groups))
        scales = np.broadcast_to(scales.reshape(-1, groups), (count, groups))[rows].astype(np.float32)
        places = held(tensors, f"{base}.weight_g_idx", "int32", (columns,)) if self.ordered else None
        if places is not None and (places == -1).all():  # the order was not kept
            places = None
        return Groups(codes, scales, self._zeros(tensors, base, count, groups)[rows] if self.zeros else None, places)

    def _zeros(self, tensors: StoredTensors, base: str, rows: int, groups: int) -> Codes:
        name, shape = f"{base}.weight_zero_point", self._zeros_shape(rows, groups)
        if self.packed_zeros:
            return unpacked(held(tensors, name, "int32", shape).T, self.bits)[:, :rows].T
        found = held(tensors, name, "int8", shape).reshape(-1, groups).view(np.uint8) + np.uint8(1 << (self.bits - 1))
        return np.broadcast_to(found, (rows, groups))

    def _zeros_shape(self, rows: int, groups: int) -> tuple[int, ...]:
        if self.single:
            return (1,)
        return (-(-rows * self.bits // 32), groups) if self.packed_zeros else (rows, groups)
