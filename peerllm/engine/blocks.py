"""The list of blocks a model walks through, how to give it another, and what stands in for what other shards hold."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


class Blocks(nn.ModuleList):
    """The blocks a shard runs, in place of all; `begun` is set once the model starts to walk through them."""

    begun = False

    def __iter__(self) -> Iterator[nn.Module]:
        self.begun = True
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else super().__getitem__(index)


def replace_blocks(owner: Any, attribute: str, blocks: Blocks, first: int, total: int) -> None:
    """Let `owner` walk through `blocks`, those from number `first` on; its config's lists per layer are cut alike."""
    setattr(owner, attribute, blocks)
    count, whole = len(blocks), owner.config
    config = copy.copy(whole)
    lists = {name: value for name, value in whole.__dict__.items() if _per_layer(value, total)}
    config.__dict__.update({name: value[first : first + count] for name, value in lists.items()})
    config.__dict__[whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = count
    properties = inspect.getmembers_static(type(whole), lambda member: isinstance(member, property))
    values: dict[str, Any] = {
        name: getattr(whole, name, None) for name, _ in properties if not hasattr(PreTrainedConfig, name)
    }
    computed = {name: value[first : first + count] for name, value in values.items() if _per_layer(value, total)}
    if computed:  # properties have no place in the copy itself
        object.__setattr__(config, "__class__", type(type(whole).__name__, (type(whole),), computed))
    owner.config = config  # the blocks keep the whole one, as they keep their numbers


def _per_layer(value: Any, total: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == total


@contextmanager
def stand_in(owner: Any, attribute: str, blocks: Blocks, first: int = 0) -> Iterator[None]:
    """`blocks` in place of the owner's own, while the context lasts."""
    kept, config = getattr(owner, attribute), owner.config
    replace_blocks(owner, attribute, blocks, first, len(kept))
    try:
        yield
    finally:
        setattr(owner, attribute, kept)
        owner.config = config


class Absent(nn.Module):
    """In the place of a module of another shard. Vectors pass, a look-up adds nothing; neither result is used."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.looks_up = isinstance(original, nn.Embedding)
        # A model's initialisation may reach for these; marked as it marks what is loaded, they are left alone.
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
    """A module that a model runs before its blocks and again after them; the second time belongs to another shard."""

    def __init__(self, original: nn.Module, blocks: Blocks) -> None:
        super().__init__()
        self.original = original
        self.passed: Callable[[], bool] = lambda: blocks.begun

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.passed() else self.original(hidden_states, *args, **kwargs)
