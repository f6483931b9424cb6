"""A checkpoint's tensors as float32 rows, mapped from safetensors files; a whole matrix is never in float32."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import numpy.typing as npt

from peerllm.engine.messages import TensorAt
from peerllm.engine.weights.checkpoint import COMPUTED, mapped
from peerllm.errors import ModelError

Floats = npt.NDArray[np.float32]
Rows = slice | npt.NDArray[np.int64]
SHIFTS = 1 << 14  # offsets at which made-up tensors start in the drawn numbers
WRAPPERS = re.compile(r"^(?:(?:model|transformer|gpt_neox|decoder)\.)+")  # prefixes in some checkpoints


def plain_name(name: str) -> str:
    """A tensor's name without the prefixes that only some checkpoints have."""
    return WRAPPERS.sub("", name)


class Tensors(Protocol):
    """Where weights come from: a checkpoint's files, or numbers made up to be timed."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape; None if there is no such tensor."""
        ...

    def floats(self, name: str, rows: Rows | int, turned: bool = False) -> Floats:
        """Rows of a matrix (of its transpose, if `turned`), or one entry of a stack, as float32."""
        ...


class Checkpoint:
    """Tensors of safetensors files by their plain names; `count` is called with the bytes read."""

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

    def mapped(self, name: str) -> npt.NDArray[Any]:
        """A tensor mapped from its file, see checkpoint.mapped."""
        if name not in self._maps:
            tensor = self._tensors.get(name)
            if tensor is None:
                raise ModelError(f"tensor {name} is missing from the model's files")
            if tensor.dtype not in COMPUTED:
                raise ModelError(f"tensor {name} holds {tensor.dtype}, which is not computed with")
            self._maps[name] = mapped(tensor)
        return self._maps[name]


class MadeUp:
    """Small numbers about zero for tensors of given shapes: timing depends on shapes alone."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._last: tuple[str, tuple[int, ...], Floats] = "", (), np.empty(0, np.float32)
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
