"""How a model's tensors are kept: rounded, left in their files, or as they are; and what memory each then takes.

It follows from the model, its files' dtypes, the dtype computed in and the quantisation alone, so that the source knows
what every device will need. Only matrices can be rounded that are multiplied with and no more, by modules of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peerllm.engine.model.config import DTYPES
from peerllm.engine.model.division import Division
from peerllm.engine.model.probing import run_block, shape_key
from peerllm.engine.model.tensor_names import TensorRecipe
from peerllm.engine.weights.checkpoint import FILE_DTYPES
from peerllm.engine.weights.rounding import block_of, packed_bytes
from peerllm.types import BITS

# They choose experts: small, and a token that is sent to another expert is another token.
ROUTERS = frozenset(["gate", "router", "shared_expert_gate", "classifier"])


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear module of the model; `turned`: its weight is [columns, rows], as GPT-2 keeps them."""

    parent: Any  # the module that has it
    attribute: str  # its name there
    bias: nn.Parameter | None
    rows: int
    columns: int
    turned: bool


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


def keeping(division: Division, found: Iterable[TensorRecipe], quantize: str) -> Keeping:
    """`found` says how the model's tensors come from the files."""
    if not quantize:
        return Keeping(quantize, {}, frozenset())
    return Keeping(quantize, matrices(division), frozenset(_tables(division, found)))


def _tables(division: Division, found: Iterable[TensorRecipe]) -> Iterable[str]:
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


def matrices(division: Division) -> dict[str, Matrix]:
    """By the weight's name in the state dict."""
    head = division.model.get_output_embeddings()
    found: dict[str, Matrix] = {}
    good: dict[object, bool] = {}
    for number, block in enumerate(division.blocks):
        key = shape_key(block)
        if key not in good:
            good[key] = _only_multiplied(division, number)
        if good[key]:
            for name, module in block.named_modules():
                _add(found, division, block, name, module, f"{division.prefix}{number}.")
    name = next((name for name, module in division.model.named_modules() if module is head), "")
    if name and not name.startswith(division.prefix):
        _add(found, division, division.model, name, head)
    return found


def _add(found: dict[str, Matrix], division: Division, root: Any, name: str, module: Any, prefix: str = "") -> None:
    """`name` is the module's in `root`, with `prefix` in the model."""
    if type(module) not in (nn.Linear, Conv1D) or module.weight.dtype != division.dtype:
        return
    path, _, last = name.rpartition(".")
    turned = type(module) is Conv1D
    rows, columns = reversed(module.weight.shape) if turned else module.weight.shape
    if last not in ROUTERS and block_of(columns) is not None:
        parent = root.get_submodule(path)
        found[f"{prefix}{name}.weight"] = Matrix(parent, last, module.bias, rows, columns, turned)


class _Stand(nn.Module):
    """Multiplies nothing, and has no weight to be asked for."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_empty(*inputs.shape[:-1], self._rows)


def _only_multiplied(division: Division, number: int) -> bool:
    """Whether a block runs without data though its matrices are no more than modules to call."""
    block = copy.deepcopy(division.blocks[number])
    for name, module in list(block.named_modules()):
        if type(module) in (nn.Linear, Conv1D):
            path, _, last = name.rpartition(".")
            rows = module.weight.shape[0] if type(module) is nn.Linear else module.weight.shape[1]
            setattr(block.get_submodule(path), last, _Stand(rows))
    cache, error = run_block(division, number, block)
    if isinstance(error, AttributeError):  # a weight was asked for
        return False
    # Routing of experts depends on values; attention has run by then, or the model is not divided.
    return error is None or cache.state(number, division.dtype).token_bytes > 0
