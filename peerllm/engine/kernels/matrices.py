"""Which tensors of a model can be rounded: matrices that are only ever multiplied with, by a module of their own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peerllm.engine.blocks import Blocks, stand_in
from peerllm.engine.config import text_config
from peerllm.engine.division import Division
from peerllm.engine.dryrun import run_without_data
from peerllm.engine.kernels.rounding import block_of
from peerllm.engine.probing import shape_key
from peerllm.engine.states import ProbeCache

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
    from transformers.cache_utils import get_layer_types_and_kwargs

    block = copy.deepcopy(division.blocks[number])
    for name, module in list(block.named_modules()):
        if type(module) in (nn.Linear, Conv1D):
            path, _, last = name.rpartition(".")
            rows = module.weight.shape[0] if type(module) is nn.Linear else module.weight.shape[1]
            setattr(block.get_submodule(path), last, _Stand(rows))
    kinds, arguments = get_layer_types_and_kwargs(text_config(division.model.config))
    cache = ProbeCache(len(division.blocks), kinds, arguments)
    try:
        with stand_in(division.owner, division.attribute, Blocks([block]), number):
            run_without_data(division.model, cache)
    except AttributeError:  # a weight was asked for
        return False
    except Exception:  # routing of experts depends on values; attention has run by then, or the model is not divided
        return cache.state(number, division.dtype).token_bytes > 0
    return True
