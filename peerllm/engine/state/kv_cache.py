"""KV slots: memory taken once for all sequences, and the view of one slot that a transformers model uses as cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from peerllm.engine.state.layer_states import (
    FULL,
    UNKEPT,
    WINDOWED,
    CacheLayerState,
    HybridCounter,
    SlotLayer,
    layer_of,
)
from peerllm.errors import EngineError


class SlotCache(Cache):
    """One slot's cache of a whole model: the shard's own blocks hold keys and values, the others only count tokens."""

    def __init__(self, layers: list[Any], owned: Mapping[int, CacheLayerState]) -> None:
        super().__init__(layers=layers)
        self.counters = [layer for number, layer in enumerate(layers) if number not in owned]
        self.rewinds = all(isinstance(layers[n], SlotLayer) or state.kind == UNKEPT for n, state in owned.items())
        self.length = 0
        self.whole = True  # every layer holds the same tokens

    def seek(self, position: int) -> None:
        """Bring every layer back to `position` tokens; 0 starts afresh. EngineError if one cannot go back so far."""
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
        """A pass of `count` tokens went well: layers that only count add them."""
        self.length += count
        self.whole = True
        for layer in self.counters:
            if isinstance(layer, SlotLayer):
                layer.seek(self.length)
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
                if isinstance(layer, HybridCounter):
                    layer.length = self.length


def kv_bytes(owned: Mapping[int, CacheLayerState], slots: int, context: int) -> int:
    """The bytes that `slot_caches` takes for these blocks."""
    total = 0
    for state in owned.values():
        windowed = state.kind in (FULL, *WINDOWED)
        kept = (state.room(context) if state.keys and state.values else 0) if windowed else context
        total += slots * (state.state_bytes + kept * state.token_bytes)
    return total


def slot_caches(
    kinds: Sequence[str],
    arguments: Sequence[Mapping[str, Any]],
    owned: Mapping[int, CacheLayerState],
    slots: int,
    context: int,
    device: torch.device | None = None,
) -> list[SlotCache]:
    """One cache per slot, as views of KV room [slots, heads, room, width] per block, which is allocated here."""
    stores = {number: _room(state, slots, context, device) for number, state in owned.items()}
    return [
        SlotCache(
            [
                layer_of(kind, argument, number in owned, *(t[slot : slot + 1] for t in stores.get(number, ())))
                for number, (kind, argument) in enumerate(zip(kinds, arguments, strict=True))
            ],
            owned,
        )
        for slot in range(slots)
    ]


def _room(state: CacheLayerState, slots: int, context: int, device: torch.device | None) -> tuple[torch.Tensor, ...]:
    """Memory for a block's keys and values, [slots, heads, room, width] each; empty if it keeps none."""
    if state.kind not in (FULL, *WINDOWED) or not (state.keys and state.values):
        return ()
    room = state.room(context)
    return tuple(
        torch.empty(slots, heads, room, width, dtype=state.dtype, device=device)
        for heads, width in (state.keys, state.values)
    )
