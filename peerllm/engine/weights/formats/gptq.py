"""Matrices as GPTQ's tools store them: columns packed into words, groups with their zeros, perhaps out of order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peerllm.engine.weights.formats.coded_rows import Rows, StoredTensors
from peerllm.engine.weights.formats.grouped_form import GroupedForm, Groups, held, unpacked
from peerllm.errors import ModelError


@dataclass(frozen=True, slots=True)
class GPTQForm(GroupedForm):
    """`added`: what is added to the zeros of the file, 1 in the format "gptq" and 0 in "gptq_v2"."""

    added: int = 1

    def named(self, base: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        groups = self.groups(columns)
        yield f"{base}.qweight", (columns * self.bits // 32, rows)
        yield f"{base}.qzeros", (groups, rows * self.bits // 32)
        yield f"{base}.scales", (groups, rows)
        if self.ordered:
            yield f"{base}.g_idx", (columns,)

    def read(self, tensors: StoredTensors, base: str, rows: Rows) -> Groups:
        words = held(tensors, f"{base}.qweight", "int32", (None, None))  # [columns · bits / 32, rows]
        columns, count = words.shape[0] * 32 // self.bits, words.shape[1]
        groups = self.groups(columns)
        scales = held(tensors, f"{base}.scales", "float", (groups, count))[:, rows]
        zeros = unpacked(held(tensors, f"{base}.qzeros", "int32", (groups, count * self.bits // 32)), self.bits)
        # Zeros wrap around: one of 0 is stored as the largest code.
        zeros = (zeros[:, rows] + np.uint8(self.added)) & np.uint8((1 << self.bits) - 1)
        if not self.zeros and (zeros != 1 << (self.bits - 1)).any():
            raise ModelError(f"tensor {base}.qzeros is not that of a symmetric quantization, as config.json says")
        return Groups(
            np.ascontiguousarray(words[:, rows].T).astype("<i4", copy=False).view(np.uint8),
            scales.T.astype(np.float32),
            zeros.T if self.zeros else None,
            held(tensors, f"{base}.g_idx", "int32", (columns,)) if self.ordered else None,
        )
