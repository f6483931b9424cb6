"""Matrices as AWQ stores them ("gemm"): eight neighbouring rows in a word, in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peerllm.engine.weights.formats.coded_rows import Rows, StoredTensors
from peerllm.engine.weights.formats.grouped_form import Codes, GroupedForm, Groups, held, packed

EACH = 8  # rows in a word
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word, counted in 4 bits from the lowest, each of eight rows is


def _rows_of(words: npt.NDArray[np.int32], rows: Rows) -> Codes:
    """Some of the rows in words [n, rows / 8]: [some rows, n]."""
    numbers = np.arange(words.shape[1] * EACH)[rows]
    taken, inverse = np.unique(numbers // EACH, return_inverse=True)
    some = np.ascontiguousarray(words.T[taken]).astype("<i4", copy=False).view(np.uint8)
    held_bytes = some.reshape(len(taken), len(words), 4)
    apart = np.empty((len(taken), EACH, len(words)), np.uint8)
    for row, place in enumerate(PLACES):
        apart[:, row] = (held_bytes[:, :, place // 2] >> (4 * (place % 2))) & 15
    some_rows: Codes = apart[inverse, numbers % EACH]
    return some_rows


@dataclass(frozen=True, slots=True)
class AWQForm(GroupedForm):
    """Of 4 bits, with zeros."""

    def named(self, base: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        groups = self.groups(columns)
        yield f"{base}.qweight", (columns, rows // EACH)
        yield f"{base}.qzeros", (groups, rows // EACH)
        yield f"{base}.scales", (groups, rows)

    def read(self, tensors: StoredTensors, base: str, rows: Rows) -> Groups:
        words = held(tensors, f"{base}.qweight", "int32", (None, None))
        groups, count = self.groups(len(words)), words.shape[1]
        scales = held(tensors, f"{base}.scales", "float", (groups, count * EACH))
        zeros = held(tensors, f"{base}.qzeros", "int32", (groups, count))
        codes = packed(_rows_of(words, rows), self.bits)
        return Groups(codes, scales[:, rows].T.astype(np.float32), _rows_of(zeros, rows))
