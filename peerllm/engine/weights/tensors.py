"""A checkpoint's tensors as float32 rows or whole numbers, mapped from its files; never a whole matrix in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import numpy.typing as npt

from peerllm.engine.messages import TensorAt
from peerllm.engine.weights.checkpoint import COMPUTED, mapped, plain_name
from peerllm.engine.weights.formats.coded_rows import CodedRows, StoredTensors, WeightForm
from peerllm.errors import ModelError

Floats = npt.NDArray[np.float32]
Rows = slice | npt.NDArray[np.int64]
SHIFTS = 1 << 14  # offsets at which made-up tensors start in the drawn numbers


class Tensors(Protocol):
    """Where weights come from: a checkpoint's files, or numbers made up to be timed."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape; None if there is no such tensor."""
        ...

    def floats(self, name: str, rows: Rows | int, turned: bool = False) -> Floats:
        """Rows of a matrix (of its transpose, if `turned`), or one entry of a stack, as float32."""
        ...

    def coded(self, form: WeightForm, name: str, rows: Rows, count: int, columns: int) -> CodedRows:
        """`count` rows of a matrix with `columns` columns that is stored in a form, as whole numbers."""
        ...

    def decoded(self, form: WeightForm, name: str, rows: Rows, count: int, columns: int) -> Floats:
        """The same in float32."""
        ...


class Checkpoint:
    """Tensors of safetensors or GGUF files by their plain names; `count` is called with the bytes read."""

    def __init__(self, tensors: Iterable[TensorAt], count: Callable[[int], None] = lambda read: None) -> None:
        self._tensors = {plain_name(tensor.name): tensor for tensor in tensors}
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self._count = count

    def at(self, name: str) -> TensorAt | None:
        """Where a tensor is in its file; None if there is no such tensor."""
        return self._tensors.get(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.shape

    def floats(self, name: str, rows: Rows | int, turned: bool = False) -> Floats:
        stored = self.mapped(name)
        part = (stored.T if turned else stored)[rows]
        self._count(part.nbytes)
        return np.ascontiguousarray(part, dtype=np.float32)

    def coded(self, form: WeightForm, name: str, rows: Rows, count: int, columns: int) -> CodedRows:
        made = form.coded(self, name, rows)
        self._count(made.codes.nbytes)
        return made

    def decoded(self, form: WeightForm, name: str, rows: Rows, count: int, columns: int) -> Floats:
        self._count(count * columns)
        return form.floats(self, name, rows)

    def stored(self, name: str) -> npt.NDArray[Any]:
        """A tensor of any type mapped from its file; implements StoredTensors."""
        if name not in self._maps:
            self._maps[name] = mapped(self._known(name))
        return self._maps[name]

    def mapped(self, name: str) -> npt.NDArray[Any]:
        """A tensor mapped from its file, see checkpoint.mapped."""
        tensor = self._known(name)
        if tensor.dtype not in COMPUTED:
            raise ModelError(f"tensor {name} holds {tensor.dtype}, which is not computed with")
        return self.stored(name)

    def _known(self, name: str) -> TensorAt:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"tensor {name} is missing from the model's files")
        return tensor


class CodedTable:
    """An embedding table that is stored in a form: rows become float32 when they are looked up."""

    def __init__(self, tensors: StoredTensors, form: WeightForm, name: str, shape: tuple[int, int]) -> None:
        self._tensors, self._form, self._name, self._shape = tensors, form, name, shape

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, ids: npt.NDArray[np.int64]) -> Floats:
        return self._form.floats(self._tensors, self._name, ids)  # not `decoded`, which counts what is loaded


class MadeUp:
    """Small numbers about zero for tensors of given shapes: timing depends on shapes alone."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._last: tuple[str, tuple[int, ...], Floats] = "", (), np.empty(0, np.float32)
        self._coded: dict[tuple[str, WeightForm, int, int], CodedRows] = {}  # the last one
        self._drawn = (np.random.default_rng(0).random(1 << 16, np.float32) - 0.5) * 0.1

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes.get(name)

    def floats(self, name: str, rows: Rows | int, turned: bool = False) -> Floats:
        shape = self._shapes[name]
        shape = shape[::-1] if turned else shape
        if isinstance(rows, int):
            taken = shape[1:]
        else:
            count = len(rows) if not isinstance(rows, slice) else len(range(*rows.indices(shape[0])))
            taken = (count, *shape[1:])
        if self._last[:2] != (name, taken):  # the pieces of a large matrix are one array
            # Tensors differ: onnxruntime keeps equal matrices once, so equal blocks would be timed with warm caches.
            self._last = name, taken, np.resize(self._drawn[crc32(name.encode()) % SHIFTS :], taken)
        return self._last[2]

    def coded(self, form: WeightForm, name: str, rows: Rows, count: int, columns: int) -> CodedRows:
        key = name, form, count, columns
        if key not in self._coded:
            start = crc32(name.encode()) % SHIFTS
            codes = np.resize(self._drawn.view(np.uint8)[start:], (count, columns * form.bits // 8))
            scales = np.resize(self._drawn[start:], (count, columns // form.block))
            zeros = np.zeros(scales.shape, np.uint8) if form.zeros else None
            made = CodedRows(form.bits, form.block, codes, scales, zeros, scales if form.minima else None)
            self._coded = {key: made}
        return self._coded[key]

    def decoded(self, form: WeightForm, name: str, rows: Rows, count: int, columns: int) -> Floats:
        return np.resize(self._drawn[crc32(name.encode()) % SHIFTS :], (count, columns))
