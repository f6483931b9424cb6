"""How a model's tensors are kept: rounded, left in their files, or as they are; and what memory each then takes.

It follows from the model, its files' dtypes, the dtype computed in and the quantisation alone, so that the source knows
what every device will need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peerllm.engine.checkpoint import FILE_DTYPES
from peerllm.engine.config import DTYPES
from peerllm.engine.division import Division
from peerllm.engine.kernels.matrices import Matrix, matrices
from peerllm.engine.kernels.rounding import packed_bytes
from peerllm.engine.names import Recipe
from peerllm.types import BITS


@dataclass(frozen=True, slots=True)
class Keeping:
    """`tables`: embeddings that stay in their files, of which a token reads a row; mapped pages are not our memory."""

    quantize: str
    matrices: dict[str, Matrix]
    tables: frozenset[str]

    def nbytes(self, name: str, tensor: torch.Tensor) -> int:
        """Memory of the tensor called `name` once it is loaded."""
        if name in self.tables:
            return 0
        if name in self.matrices:
            matrix = self.matrices[name]
            return packed_bytes(matrix.rows, matrix.columns, BITS[self.quantize])
        return tensor.nbytes


def keeping(division: Division, found: Iterable[Recipe], quantize: str) -> Keeping:
    """`found` says how the model's tensors come from the files."""
    if not quantize:
        return Keeping(quantize, {}, frozenset())
    return Keeping(quantize, matrices(division), frozenset(_tables(division, found)))


def _tables(division: Division, found: Iterable[Recipe]) -> Iterable[str]:
    model: Any = division.model
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name in division.before and name not in division.after
    }
    for recipe in found:
        held = FILE_DTYPES[recipe.sources[0][1].dtype].name
        if recipe.converter is None and DTYPES.get(held) is division.dtype:
            yield from division.names_of(recipe.targets[0]) & names
