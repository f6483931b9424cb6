"""The list of blocks a model walks through, and how to give it another."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
