"""Walking through a model that has shapes but no data."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PROBE_TOKENS = 2


class _Yes(TorchFunctionMode):
    """Tensors without data are asked for their values ("is all of the mask set?"): yes."""

    _questions = (torch.Tensor.item, torch.Tensor.__bool__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._questions and args[0].is_meta:
            return True
        if func is torch.Tensor.__contains__ and args[0].is_meta:
            return False  # "is there padding among the token ids?": there never is
        return func(*args, **(kwargs or {}))


def accepted(model: Any, **offered: Any) -> dict[str, Any]:
    """Those of `offered` that a model's forward names among its parameters."""
    names = _parameters(type(model).forward)
    return {name: value for name, value in offered.items() if name in names}


@lru_cache(maxsize=64)
def _parameters(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def run_without_data(model: Any, cache: Any) -> None:
    """Walk through a model on the meta device as a first chunk of tokens would."""
    # A scaled rotary embedding looks at the positions' values, which do not exist here.
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
