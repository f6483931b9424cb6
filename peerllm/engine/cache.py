"""KV slots: room made once for every sequence, and the view of one that a transformers model takes for its cache."""

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
from peerllm.engine.place import CPU
from peerllm.engine.states import FULL, WINDOWED, LayerState
from peerllm.errors import EngineError


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One slot's keys and values of one block, in room made beforehand ([1, heads, room, width] each).

    With a window the last `room` tokens are kept, of which a query is shown no more than the window needs.
    Without room (`keys` None) it stands for a block of another shard and only counts.
    """

    is_sliding = False

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
        """Forget what lies at `position` and after, or count on where this layer holds nothing itself."""
        back = self.length - position
        if position and self.keys is not None:
            if back < 0:
                raise EngineError(f"a gap in the sequence: {self.length} tokens are held, not {position}")
            if self.held - back < min(position, (self.window or position + 1) - 1):
                raise EngineError(f"position {position} is too far back for a window; replay the sequence")
        self.held = max(self.held - back, 0) if position else 0
        self.length = position

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        assert self.keys is not None
        assert self.values is not None
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
        """The room is full: keep what the window and a rollback need, so that the next slide is some tokens away."""
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
    """Stands for a block of another shard that has both attention and a recurrent state."""

    length = 0

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class SlotCache(Cache):
    """One slot's cache of a whole model: its own blocks hold keys and values, the others only count tokens."""

    def __init__(self, layers: list[Any], owned: Mapping[int, LayerState]) -> None:
        super().__init__(layers=layers)
        self.counters = [layer for number, layer in enumerate(layers) if number not in owned]
        self.rewinds = all(isinstance(layers[number], SlotLayer) for number in owned)
        self.length = 0
        self.whole = True  # every layer holds the same tokens

    def seek(self, position: int) -> None:
        """Bring every layer to `position` tokens; 0 starts afresh. EngineError if that is no longer possible."""
        if position > self.length:
            raise EngineError(f"a gap in the sequence: {self.length} tokens are held, the next is for {position}")
        if position and not self.rewinds and (position < self.length or not self.whole):
            raise EngineError("a recurrent layer cannot go back; replay the sequence from its start")
        for layer in self.layers:
            if isinstance(layer, SlotLayer):
                layer.seek(position)
            elif position == 0:
                layer.reset()
            if isinstance(layer, HybridCounter):
                layer.length = position
        self.length = position
        self.whole = False

    def advance(self, count: int) -> None:
        """A pass of `count` tokens went well: let the layers that only count take note of it."""
        self.length += count
        self.whole = True
        for layer in self.counters:
            if isinstance(layer, SlotLayer):
                layer.seek(self.length)
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
                if isinstance(layer, HybridCounter):
                    layer.length = self.length


def kv_bytes(owned: Mapping[int, LayerState], slots: int, context: int) -> int:
    """What `slot_caches` takes for these blocks."""
    total = 0
    for state in owned.values():
        windowed = state.kind in (FULL, *WINDOWED)
        kept = (state.room(context) if state.keys and state.values else 0) if windowed else context
        total += slots * (state.state_bytes + kept * state.token_bytes)
    return total


def slot_caches(
    kinds: Sequence[str],
    arguments: Sequence[Mapping[str, Any]],
    owned: Mapping[int, LayerState],
    slots: int,
    context: int,
    device: torch.device = CPU,
) -> list[SlotCache]:
    """By slot its view of a shard's KV room, [slots, heads, room, width] per block, which is made at once."""
    stores = {number: _room(state, slots, context, device) for number, state in owned.items()}
    return [
        SlotCache(
            [
                _layer(kind, argument, number in owned, *(t[slot : slot + 1] for t in stores.get(number, ())))
                for number, (kind, argument) in enumerate(zip(kinds, arguments, strict=True))
            ],
            owned,
        )
        for slot in range(slots)
    ]


def _layer(kind: str, arguments: Mapping[str, Any], owned: bool, *stores: torch.Tensor) -> Any:
    if kind in (FULL, *WINDOWED):
        keys, values = stores or (None, None)
        return SlotLayer(arguments.get("sliding_window") if kind in WINDOWED else None, keys, values)
    if kind == "hybrid" and not owned:
        return HybridCounter(**arguments)
    return DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)


def _room(state: LayerState, slots: int, context: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """For a block's keys and values, if it keeps any: [slots, heads, room, width] each."""
    if state.kind not in (FULL, *WINDOWED) or not (state.keys and state.values):
        return ()
    room = state.room(context)
    return tuple(
        torch.empty(slots, heads, room, width, dtype=state.dtype, device=device)
        for heads, width in (state.keys, state.values)
    )
