"""Matrices in GGML's block types, as GGUF files hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peerllm.engine.weights.formats.coded_rows import CodedRows, Floats, Rows, StoredTensors
from peerllm.engine.weights.formats.ggml_blocks import BLOCK_TYPES
from peerllm.errors import ModelError
from peerllm.stored_types import STORED_TYPES


@dataclass(frozen=True, slots=True)
class GGMLForm:
    """Implements WeightForm for the block type `stored_type`: a matrix, or a stack of them, is one tensor."""

    stored_type: str

    def __post_init__(self) -> None:
        if self.stored_type not in BLOCK_TYPES:
            raise ModelError(f"weights of type {self.stored_type[:32]!r} are not computed with")

    @property
    def bits(self) -> int:
        return BLOCK_TYPES[self.stored_type].bits

    @property
    def block(self) -> int:
        return BLOCK_TYPES[self.stored_type].block

    @property
    def zeros(self) -> bool:
        return BLOCK_TYPES[self.stored_type].zeros

    @property
    def minima(self) -> bool:
        return BLOCK_TYPES[self.stored_type].minima

    @property
    def ordered(self) -> bool:
        return False

    def tensors(self, name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield name, (rows, columns)

    def coded(self, tensors: StoredTensors, name: str, rows: Rows) -> CodedRows:
        stored, kind = tensors.stored(name), BLOCK_TYPES[self.stored_type]
        _, size = STORED_TYPES[self.stored_type]
        if stored.dtype != np.uint8 or stored.ndim < 2 or stored.shape[-1] % size:
            raise ModelError(f"tensor {name} is no matrix of type {self.stored_type}, as config.json says")
        some = np.ascontiguousarray(stored.reshape(-1, stored.shape[-1])[rows])  # of a stack, all matrices' rows
        count = len(some)
        codes, scales, minima = kind.unpack(some.reshape(-1, size))
        scales = scales.reshape(count, -1)
        zeros = np.broadcast_to(np.uint8(0), scales.shape) if kind.zeros else None
        return CodedRows(
            kind.bits, kind.block, codes.reshape(count, -1), scales, zeros,
            None if minima is None else minima.reshape(count, -1),
        )  # fmt: skip

    def floats(self, tensors: StoredTensors, name: str, rows: Rows) -> Floats:
        return self.coded(tensors, name, rows).floats()
