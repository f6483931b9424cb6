"""Making a model run over other blocks than its own, skip modules of other shards, and run without data."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

PROBE_TOKENS = 2


class ShardBlocks(nn.ModuleList):
    """The blocks of a shard, in place of the model's whole list; iterating over them sets `begun`."""

    begun = False

    def __iter__(self) -> Iterator[nn.Module]:
        self.begun = True
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else super().__getitem__(index)


def replace_blocks(owner: Any, attribute: str, blocks: ShardBlocks, first: int, total: int) -> None:
    """Let `owner` run `blocks`, which start at number `first`; per-layer lists of its config are cut to match."""
    setattr(owner, attribute, blocks)
    count, whole = len(blocks), owner.config
    config = copy.copy(whole)
    lists = {name: value for name, value in whole.__dict__.items() if _per_layer(value, total)}
    config.__dict__.update({name: value[first : first + count] for name, value in lists.items()})
    if not getattr(whole, "hidden_size_per_layer_input", 0):  # else it also says how wide a table's rows are
        config.__dict__[whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = count
    properties = inspect.getmembers_static(type(whole), lambda member: isinstance(member, property))
    values: dict[str, Any] = {
        name: getattr(whole, name, None) for name, _ in properties if not hasattr(PreTrainedConfig, name)
    }
    computed = {name: value[first : first + count] for name, value in values.items() if _per_layer(value, total)}
    if computed:  # a copy cannot override properties, but a subclass can
        object.__setattr__(config, "__class__", type(type(whole).__name__, (type(whole),), computed))
    owner.config = config  # the blocks keep the whole configuration, since they keep their numbers


def _per_layer(value: Any, total: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == total


@contextmanager
def stand_in(owner: Any, attribute: str, blocks: ShardBlocks, first: int = 0) -> Iterator[None]:
    """Let the owner run `blocks` instead of its own within the context."""
    kept, config = getattr(owner, attribute), owner.config
    replace_blocks(owner, attribute, blocks, first, len(kept))
    try:
        yield
    finally:
        setattr(owner, attribute, kept)
        owner.config = config


class Absent(nn.Module):
    """Replaces a module of another shard: returns vectors unchanged and zero for a look-up; nobody uses the results."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.looks_up = isinstance(original, nn.Embedding)
        # A model's initialisation may access these; marked as loaded, they are left alone.
        self.__dict__.update(weight=torch.empty(0), bias=None)
        self.__dict__["weight"].__dict__["_is_hf_initialized"] = True

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not self.looks_up:
            for value in given:
                if value.is_floating_point():
                    return value
        return torch.zeros(1, device=given[0].device if given else None)


class BeforeBlocks(nn.Module):
    """Runs a module before the blocks and skips it after them, where it belongs to another shard."""

    def __init__(self, original: nn.Module, blocks: ShardBlocks) -> None:
        super().__init__()
        self.original = original
        self.passed: Callable[[], bool] = lambda: blocks.begun

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.passed() else self.original(hidden_states, *args, **kwargs)


class _Yes(TorchFunctionMode):
    """Answers yes when a model asks a tensor without data for its value (such as "is all of the mask set?")."""

    _questions = (torch.Tensor.item, torch.Tensor.__bool__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._questions and args[0].is_meta:
            return True
        if func is torch.Tensor.__contains__ and args[0].is_meta:
            return False  # "is there padding among the token ids?" is always no
        return func(*args, **(kwargs or {}))


def accepted(model: Any, **offered: Any) -> dict[str, Any]:
    """Those of `offered` that are parameters of the model's forward."""
    names = _parameters(type(model).forward)
    return {name: value for name, value in offered.items() if name in names}


@lru_cache(maxsize=64)
def _parameters(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def run_without_data(model: Any, cache: Any) -> None:
    """Run a model on the meta device as for a first chunk of tokens."""
    # A scaled rotary embedding would read the positions' values, which do not exist here.
    scaled = [module for module in model.modules() if getattr(module, "rope_type", "default") != "default"]
    kinds = [module.rope_type for module in scaled]
    for module, kind in zip(scaled, kinds, strict=True):
        module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    positions = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode(), _Yes():
            model(**accepted(model, input_ids=positions, position_ids=positions, past_key_values=cache, use_cache=True))
    finally:
        for module, kind in zip(scaled, kinds, strict=True):
            module.rope_type = kind
