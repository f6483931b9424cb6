"""How a model's tensors are kept (rounded, left in their files, or as they are), and the memory that each then takes.

This follows from the model, its files' dtypes, the compute dtype and the quantisation alone, so that the source knows
what every device will need. A matrix can be rounded only if a linear module, and nothing else, uses it.
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

# Routers choose experts. They are small, and rounding one could send a token to another expert.
ROUTERS = frozenset(["gate", "router", "shared_expert_gate", "classifier"])


PER_LAYER = "embed_tokens_per_layer.weight"  # larger than all else of its model together, and looked up only


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear module of the model; `turned`: its weight is [columns, rows], as in GPT-2."""

    parent: Any  # the module that contains the linear module
    attribute: str  # the linear module's name in its parent
    bias: nn.Parameter | None
    rows: int
    columns: int
    turned: bool


@dataclass(frozen=True, slots=True)
class Keeping:
    """How tensors are kept. `tables`: embeddings that stay in their files, whose mapped pages are not our memory."""

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
    """Decide how tensors are kept; `found` says how the model's tensors come from the files."""
    tables = frozenset(_tables(division, found))
    if not quantize:
        return Keeping(quantize, {}, frozenset(name for name in tables if name.endswith(PER_LAYER)))
    return Keeping(quantize, matrices(division), tables)


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
    """The matrices that can be rounded, by the weight's name in the state dict."""
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
    """Add a module if it can be rounded; its name is `name` in `root`, and `prefix` + `name` in the model."""
    if type(module) not in (nn.Linear, Conv1D) or module.weight.dtype != division.dtype:
        return
    path, _, last = name.rpartition(".")
    turned = type(module) is Conv1D
    rows, columns = reversed(module.weight.shape) if turned else module.weight.shape
    if last not in ROUTERS and block_of(columns) is not None:
        parent = root.get_submodule(path)
        found[f"{prefix}{name}.weight"] = Matrix(parent, last, module.bias, rows, columns, turned)


class _Stand(nn.Module):
    """A linear module without a weight: returns an output of the right shape."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_empty(*inputs.shape[:-1], self._rows)


def _only_multiplied(division: Division, number: int) -> bool:
    """Whether a block only calls its linear modules and never uses their weights itself."""
    block = copy.deepcopy(division.blocks[number])
    for name, module in list(block.named_modules()):
        if type(module) in (nn.Linear, Conv1D):
            path, _, last = name.rpartition(".")
            rows = module.weight.shape[0] if type(module) is nn.Linear else module.weight.shape[1]
            setattr(block.get_submodule(path), last, _Stand(rows))
    cache, error = run_block(division, number, block)
    if isinstance(error, AttributeError):  # the block used a weight itself
        return False
    # Routing of experts needs values and may fail; by then attention has run.
    return error is None or cache.state(number).token_bytes > 0
