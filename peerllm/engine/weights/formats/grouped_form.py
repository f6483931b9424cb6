"""What GPTQ, AWQ and compressed-tensors share: whole numbers of 4 or 8 bits, groups of columns with a scale each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peerllm.engine.weights.formats.coded_rows import CodedRows, Floats, Rows, StoredTensors
from peerllm.engine.weights.rounding import halves, nibbles
from peerllm.errors import ModelError

Codes = npt.NDArray[np.uint8]
Kind = Literal["int32", "int8", "uint8", "float"]
FLOATS = ("float16", "bfloat16", "float32")
SMALLEST = 16  # the products' least block
LARGEST = 128  # a larger one saves nothing that can be measured


def block_in(group: int | None, widths: int) -> int:
    """The largest block that divides a group (None: a whole row) and rows of widths that `widths` divides."""
    return next((block for block in (LARGEST, 64, 32, SMALLEST) if widths % block == (group or 0) % block == 0), 0)


def base_name(name: str) -> str:
    """The name of the linear layer that the matrix called `name` belongs to."""
    return name.removesuffix(".weight")


def held(tensors: StoredTensors, name: str, kind: Kind, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """A stored tensor; ModelError unless it has the kind of numbers and the shape (None: any size)."""
    found = np.asarray(tensors.stored(name))
    wanted = FLOATS if kind == "float" else (kind,)
    fits = len(found.shape) == len(shape) and all(b in (None, a) for a, b in zip(found.shape, shape, strict=True))
    if not fits or found.dtype.name not in wanted:
        needed = f"{kind} {['any' if side is None else side for side in shape]}"
        raise ModelError(f"tensor {name} is {found.dtype} {list(found.shape)}; its quantization needs {needed}")
    return found


def unpacked(words: npt.NDArray[Any], bits: int) -> Codes:
    """The whole numbers in 32-bit words, lowest bits first: the last dimension grows by 32 / bits."""
    held_bytes = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return held_bytes
    return halves(held_bytes)


def packed(codes: Codes, bits: int) -> Codes:
    """Codes [rows, columns] as CodedRows has them."""
    return nibbles(np.ascontiguousarray(codes)) if bits == 4 else codes


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows of a matrix as a file has them."""

    codes: Codes  # [rows, columns], in CodedRows' packing
    scales: Floats  # [rows, groups]
    zeros: Codes | None  # [rows, groups]
    places: npt.NDArray[Any] | None = None  # each column's group; None: neighbours share a group


@dataclass(frozen=True, slots=True)
class GroupedForm(ABC):
    """Implements WeightForm but for the names and the packing of the tensors."""

    bits: int
    group: int | None  # columns that share a scale; None: all of a row
    block: int  # divides the group
    zeros: bool  # else codes have 2^(bits - 1) for zero
    ordered: bool = False  # the columns of a group are anywhere in a row, and a tensor says where

    @property
    def minima(self) -> bool:
        return False

    @abstractmethod
    def read(self, tensors: StoredTensors, base: str, rows: Rows) -> Groups:
        """Some rows of a linear layer's matrix; ModelError if the tensors do not fit each other."""

    @abstractmethod
    def named(self, base: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """What `tensors` gives, for a layer whose sizes were checked."""

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        if columns % self.block or columns * self.bits % 32:
            raise ModelError(f"{name}: rows of {columns} weights cannot be divided into blocks of {self.block}")
        return self.named(base_name(name), rows, columns)

    def coded(self, tensors: StoredTensors, name: str, rows: Rows) -> CodedRows:
        base = base_name(name)
        found = self.read(tensors, base, rows)
        codes, columns, order = found.codes, found.codes.shape[1] * 8 // self.bits, None
        if not columns or columns % self.block:
            raise ModelError(f"{name}: rows of {columns} weights cannot be divided into blocks of {self.block}")
        if found.places is not None and (order := self._order(base, found.places, columns)) is not None:
            apart = halves(codes) if self.bits == 4 else codes
            codes = packed(apart[:, order], self.bits)
        zeros = None if found.zeros is None else self._spread(found.zeros, columns)
        return CodedRows(self.bits, self.block, codes, self._spread(found.scales, columns), zeros, order=order)

    def floats(self, tensors: StoredTensors, name: str, rows: Rows) -> Floats:
        return self.coded(tensors, name, rows).floats()

    def groups(self, columns: int) -> int:
        """How many scales a row has."""
        return 1 if self.group is None else -(-columns // self.group)

    def _spread(self, values: npt.NDArray[Any], columns: int) -> npt.NDArray[Any]:
        """Values of groups [rows, groups] as values of blocks [rows, columns / block]."""
        blocks = columns // self.block
        each = blocks if self.group is None else self.group // self.block
        return np.ascontiguousarray(np.repeat(values, each, axis=1)[:, :blocks])

    def _order(self, base: str, places: npt.NDArray[Any], columns: int) -> npt.NDArray[np.int64] | None:
        """The columns sorted by their groups; None if they are in that order."""
        count, group = self.groups(columns), self.group or columns
        if places.min() < 0 or places.max() >= count:
            raise ModelError(f"tensor {base}.g_idx names groups {places.min()} to {places.max()} of {count}")
        sizes = np.full(count, group)
        sizes[-1] = columns - (count - 1) * group
        if (np.bincount(places, minlength=count) != sizes).any():
            raise ModelError(f"tensor {base}.g_idx gives some groups more than {group} columns, others fewer")
        order = np.argsort(places, kind="stable")
        return None if (order == np.arange(columns)).all() else order
