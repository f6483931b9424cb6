"""Rows of a matrix as whole numbers with scales, as files store them and as products take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from peerllm.engine.weights.rounding import halves

Floats = npt.NDArray[np.float32]
Rows = slice | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CodedRows:
    """`rows` rows of `columns` weights: weight = (code - zero) · scale - minimum, `block` neighbours sharing those."""

    bits: int  # 4 or 8
    block: int
    codes: npt.NDArray[np.uint8]  # [rows, columns · bits / 8]; of 4 bits two in a byte, the first in the lower half
    scales: Floats  # [rows, columns / block]
    zeros: npt.NDArray[np.uint8] | None = None  # [rows, columns / block], one in a byte; None: 2^(bits - 1)
    minima: Floats | None = None  # [rows, columns / block]; None: 0
    order: npt.NDArray[np.int64] | None = None  # column i of the codes is column order[i] of the matrix; None: i

    def floats(self) -> Floats:
        """The weights in float32, [rows, columns], in the matrix's own order of columns."""
        rows = len(self.codes)
        codes = self.codes
        if self.bits == 4:
            codes = halves(codes)
        whole = codes.reshape(rows, -1, self.block).astype(np.float32)
        zeros = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[:, :, None].astype(np.float32)
        whole -= zeros
        whole *= self.scales[:, :, None]
        if self.minima is not None:
            whole -= self.minima[:, :, None]
        weights = whole.reshape(rows, -1)
        if self.order is None:
            return weights
        restored = np.empty_like(weights)
        restored[:, self.order] = weights
        return restored

    def centred(self) -> CodedRows:
        """The same weights (to float32's last bit), with zeros that take up as much of the minima as whole numbers can.

        A product rounds its inputs to 8 bits for the codes but not for the minima, and what rounding does to an input
        is multiplied with code - zero. Codes that all lie above their zero triple that error.
        """
        if self.minima is None:
            return self
        most = 15 if self.zeros is not None else 1 << (self.bits - 1)
        with np.errstate(all="ignore"):  # a scale may be 0
            shift = np.nan_to_num(np.rint(self.minima / self.scales), nan=0.0, posinf=0.0, neginf=0.0).clip(0, most)
        minima = self.minima - shift * self.scales
        if self.zeros is not None:
            return replace(self, zeros=shift.astype(np.uint8), minima=minima)
        both = 17 if self.bits == 4 else 1  # two codes in a byte
        apart = self.codes.reshape(*self.scales.shape, -1) - (shift * both).astype(np.uint8)[:, :, None]
        return replace(self, codes=apart.reshape(self.codes.shape), minima=minima)


class StoredTensors(Protocol):
    """The bytes of a checkpoint's tensors."""

    def stored(self, name: str) -> npt.NDArray[Any]:
        """A tensor as its file holds it, mapped; GGML block types as uint8 [..., rows, bytes of a row]."""
        ...


class WeightForm(Protocol):
    """How a checkpoint stores the matrix called `name`; equal forms of one kind compare equal."""

    @property
    def bits(self) -> int:
        """Of the codes that products take; 0: the form has no whole numbers, only floats (FP8)."""
        ...

    @property
    def block(self) -> int: ...

    @property
    def zeros(self) -> bool:
        """Whether CodedRows has zeros."""
        ...

    @property
    def minima(self) -> bool:
        """Whether CodedRows has minima."""
        ...

    @property
    def ordered(self) -> bool:
        """Whether CodedRows may have an order of columns."""
        ...

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the tensors that hold a matrix [rows, columns]; the first one's name has the rows."""
        ...

    def coded(self, tensors: StoredTensors, name: str, rows: Rows) -> CodedRows:
        """Some rows of the matrix as whole numbers; ModelError if the tensors do not fit."""
        ...

    def floats(self, tensors: StoredTensors, name: str, rows: Rows) -> Floats:
        """Some rows of the matrix in float32."""
        ...
