"""What a block keeps of a sequence: its layer of the cache, and a cache without room that finds out what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from peerllm.engine import base
from peerllm.engine.state.state_kinds import LayerState, SequenceArray, TokenArray
from peerllm.errors import EngineError

FULL, WINDOWED = "full_attention", ("sliding_attention", "chunked_attention")
UNKEPT = "dummy"  # transformers' type of a layer that keeps nothing of its own
# transformers' layer types that a sequence can go back in, and those of which SlotCache keeps a snapshot.
REWINDS, SNAPSHOTS_OF = (FULL, *WINDOWED, UNKEPT), ("linear_attention", "conv", "hybrid")


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One slot's keys and values of one block, in room made beforehand ([1, heads, room, width] each).

    With a window, the last `room` tokens are kept, and a query is shown only as many of them as the window needs.
    Without room (`keys` None) the layer stands for a block of another shard: it counts tokens, or notes what is given.
    """

    is_sliding = False
    given: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, window: int | None, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window, self.keys, self.values = window, keys, values
        self.is_sliding = window is not None
        self.is_initialized = keys is not None
        self.length = 0  # tokens of the sequence so far
        self.held = 0  # of those, the last so many are in the room

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = self.length if self.window is None else min(self.length, self.window - 1)
        return past + query_length, self.length - past

    def seek(self, position: int) -> None:
        """Forget what lies at `position` and after. A layer without room only sets its count."""
        back = self.length - position
        if position and self.keys is not None:
            if back < 0:
                raise EngineError(f"a gap in the sequence: {self.length} tokens are held, not {position}")
            if self.held - back < min(position, (self.window or position + 1) - 1):
                raise EngineError(f"position {position} is too far back for a window; replay the sequence")
        self.held = max(self.held - back, 0) if position else 0
        self.length = position

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.keys is None or self.values is None:
            self.given = key_states, value_states
            return self.given
        count, room = key_states.shape[2], self.keys.shape[2]
        shown = self.get_mask_sizes(count)[0]
        if self.held + count > room:
            result = self._slide(key_states, value_states, count, room, shown)
        else:
            end = self.held + count
            self.keys[:, :, self.held : end] = key_states
            self.values[:, :, self.held : end] = value_states
            self.held = end
            result = self.keys[:, :, end - shown : end], self.values[:, :, end - shown : end]
        self.length += count
        return result

    def _slide(self, key_states: Any, value_states: Any, count: int, room: int, shown: int) -> tuple[Any, Any]:
        """The room is full: keep only what the window and a rollback need, so that the next slide is far."""
        if self.window is None:
            raise EngineError(f"the slot's {room} tokens are full")
        old = min(self.held, shown - count + base.ROLLBACK_TOKENS)
        results = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            assert store is not None
            whole = torch.cat([store[:, :, self.held - old : self.held], new], dim=2)
            store[:, :, : min(room, old + count)] = whole[:, :, -room:]
            results.append(whole[:, :, -shown:])
        self.held = min(room, old + count)
        return results[0], results[1]


class HybridCounter(LinearAttentionAndFullAttentionLayer):  # type: ignore[no-untyped-call]
    """A layer without room for a block of another shard that has both attention and a recurrent state."""

    length = 0

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def layer_of(kind: str, arguments: Mapping[str, Any], owned: bool, *stores: torch.Tensor) -> Any:
    """A block's layer of a cache; `stores` are the room for its keys and values, if it has any."""
    if kind in (FULL, *WINDOWED):
        keys, values = stores or (None, None)
        return SlotLayer(arguments.get("sliding_window") if kind in WINDOWED else None, keys, values)
    if kind == "hybrid" and not owned:
        return HybridCounter(**arguments)
    return DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)


class ProbeCache(Cache):
    """An empty cache that notes what each block would keep."""

    def __init__(
        self, count: int, kinds: Sequence[str] | None = None, arguments: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.kinds = kinds or [FULL] * count
        self.arguments = arguments or [{}] * count
        super().__init__(layers=[layer_of(k, a, owned=True) for k, a in zip(self.kinds, self.arguments, strict=True)])

    def state(self, number: int) -> LayerState:
        """What block `number` keeps of a sequence; known once the block has run."""
        layer: Any = self.layers[number]
        stored = getattr(layer, "given", None)
        if stored is None and getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None:
            stored = layer.keys, layer.values
        kept = zip(("keys", "values"), stored or (), strict=False)
        return LayerState(
            tuple(TokenArray(name, one.shape[1], one.shape[-1], dtype_name(one)) for name, one in kept),
            tuple(SequenceArray(name, tuple(one.shape[1:]), dtype_name(one)) for name, one in fixed_arrays(layer)),
            self.arguments[number].get("sliding_window") if self.kinds[number] != FULL else None,
        )


def fixed_arrays(layer: Any) -> list[tuple[str, torch.Tensor]]:
    """What a layer of a cache keeps once for a sequence [1, ...], by names as in state_kinds."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return []
    return [
        (f"{name}_{index}" if index else name, tensor)
        for name, states in (("convolution", layer.conv_states), ("recurrent", layer.recurrent_states))
        for index, tensor in states.items()
        if tensor is not None
    ]


def dtype_name(tensor: torch.Tensor) -> str:
    """The tensor's dtype as numpy names it."""
    return str(tensor.dtype).removeprefix("torch.")
