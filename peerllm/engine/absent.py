"""What stands in a shard's model where the whole model has something that another shard holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peerllm.engine.blocks import Blocks


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
