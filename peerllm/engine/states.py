"""What a block keeps of a sequence: measured by a cache that stores nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
)

from peerllm.engine import base

FULL, WINDOWED = "full_attention", ("sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True)
class LayerState:
    """What one block keeps of a sequence: keys and values per token [heads, width], and state of a fixed size."""

    kind: str  # transformers' layer type
    arguments: Mapping[str, Any]
    keys: tuple[int, int] | None
    values: tuple[int, int] | None
    dtype: torch.dtype
    state_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token."""
        return sum(shape[0] * shape[1] for shape in (self.keys, self.values) if shape) * self.dtype.itemsize

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, itself included; None for all."""
        return self.arguments.get("sliding_window") if self.kind in WINDOWED else None

    @property
    def kept_tokens(self) -> int | None:
        """The most tokens of a sequence that are kept; None for all."""
        return None if self.window is None else self.window + 2 * base.ROLLBACK_TOKENS

    def room(self, context: int) -> int:
        """Tokens of room per slot."""
        return context if self.kept_tokens is None else min(context, self.kept_tokens)


class _Probed(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Notes the shape of what a block stores and stores nothing."""

    is_sliding = False
    stored: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.stored = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class ProbeCache(Cache):
    """An empty cache that learns what each block would keep."""

    def __init__(
        self, count: int, kinds: Sequence[str] | None = None, arguments: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.kinds = kinds or [FULL] * count
        self.arguments = arguments or [{}] * count
        super().__init__(layers=[self._layer(k, a) for k, a in zip(self.kinds, self.arguments, strict=True)])

    @staticmethod
    def _layer(kind: str, arguments: Mapping[str, Any]) -> Any:
        if kind in (FULL, *WINDOWED):
            layer: Any = _Probed()  # type: ignore[no-untyped-call]
            layer.is_sliding = kind in WINDOWED
            return layer
        return DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)

    def state(self, number: int, dtype: torch.dtype) -> LayerState:
        """What block `number` keeps, after it was run."""
        layer: Any = self.layers[number]
        stored = getattr(layer, "stored", None)
        if stored is None and getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None:
            stored = layer.keys, layer.values
        shapes: list[tuple[int, int] | None] = [None, None]
        if stored is not None:
            shapes = [(tensor.shape[1], tensor.shape[-1]) for tensor in stored]
            dtype = stored[0].dtype
        held = 0
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            kept = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            held = sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)
        return LayerState(self.kinds[number], self.arguments[number], shapes[0], shapes[1], dtype, held)
