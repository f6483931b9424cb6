"""KV slots: memory taken once for all sequences, and the view of one slot that a transformers model uses as cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from peerllm.engine.state.layer_states import (
    FULL,
    WINDOWED,
    HybridCounter,
    SlotLayer,
    fixed_arrays,
    layer_of,
)
from peerllm.engine.state.state_kinds import LayerState
from peerllm.errors import EngineError


class SlotCache(Cache):
    """One slot's cache of a whole model: the shard's own blocks hold their states, the others only count tokens."""

    def __init__(self, layers: list[Any], owned: Mapping[int, LayerState]) -> None:
        super().__init__(layers=layers)
        self.counters = [layer for number, layer in enumerate(layers) if number not in owned]
        self._owned = {number: layers[number] for number in owned}
        self._rewinds = all(isinstance(layer, SlotLayer | DummyLayer) for layer in self._owned.values())
        self._snapshot: list[torch.Tensor] = []  # of what the blocks keep once for a sequence
        self._snapshot_at = 0  # 0: there is none
        self.length = 0
        self.whole = True  # every layer holds the same tokens

    def seek(self, position: int) -> None:
        """Bring every layer back to `position` tokens; 0 starts afresh. EngineError if one cannot go back there."""
        if position > self.length:
            raise EngineError(f"a gap in the sequence: {self.length} tokens are held, the next is for {position}")
        if position and not self._rewinds and (position < self.length or not self.whole):
            if position != self._snapshot_at:
                raise EngineError(f"a recurrent layer cannot go back to position {position}; replay the sequence")
            self._restore(position)
        if position < self._snapshot_at:
            self._snapshot_at = 0
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
        self._count(self.length + count)

    def keep_snapshot(self) -> None:
        """Keep a copy of what recurrent blocks hold now, for a later run that begins at this position."""
        if len(self._snapshot) != len(fixed := self._fixed()):
            self._snapshot = [torch.empty_like(tensor) for tensor in fixed]
        for kept, tensor in zip(self._snapshot, fixed, strict=True):
            kept.copy_(tensor)
        self._snapshot_at = self.length

    def held(self, block: int) -> range:
        """The tokens whose rows a block has; none while it is not known (a pass failed)."""
        layer = self._owned[block]
        return range(self.length - layer.held, self.length) if self.whole else range(0)

    def part(self, block: int, start: int, stop: int, state: LayerState) -> dict[str, torch.Tensor]:
        """Rows [tokens, heads × width] of tokens start..stop - 1, by array; EngineError if the block lacks some."""
        held, layer = self.held(block), self._owned[block]
        if not held.start <= start < stop <= held.stop:
            raise EngineError(f"block {block} holds tokens {held.start}..{held.stop - 1}, not {start}..{stop - 1}")
        stores = {kept.name: getattr(layer, kept.name)[0] for kept in state.tokens}
        rows = slice(start - held.start, stop - held.start)
        copies = {name: store[:, rows].transpose(0, 1).clone() for name, store in stores.items()}
        return {name: copy.reshape(stop - start, -1) for name, copy in copies.items()}

    def add(self, block: int, rows: Mapping[str, torch.Tensor], dropped: int, row: int) -> None:
        """Write rows of a part where `ArrivingSlot.place` says; the slot is empty."""
        for name, given in rows.items():
            store = getattr(self._owned[block], name)[0]
            if dropped:
                store[:, :row] = store[:, dropped : dropped + row].clone()
            store[:, row : row + len(given)] = given.reshape(len(given), store.shape[0], -1).transpose(0, 1)

    def begin(self, tokens: int, starts: Mapping[int, int]) -> None:
        """The slot's sequence begins with `tokens` tokens that were added; `starts` as ArrivingSlot.settle says."""
        for number, start in starts.items():
            layer = self._owned[number]
            layer.length, layer.held = tokens, tokens - start
        self._count(tokens)

    def _count(self, length: int) -> None:
        self.length = length
        self.whole = True
        for layer in self.counters:
            if isinstance(layer, SlotLayer):
                layer.seek(length)
            elif isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
                if isinstance(layer, HybridCounter):
                    layer.length = length

    def _restore(self, position: int) -> None:
        for tensor, kept in zip(self._fixed(), self._snapshot, strict=True):
            tensor.copy_(kept)
        for layer in self._owned.values():
            if isinstance(layer, LinearAttentionAndFullAttentionLayer):
                DynamicLayer.crop(layer, position - layer.get_seq_length())

    def _fixed(self) -> list[torch.Tensor]:
        return [tensor for layer in self._owned.values() for _, tensor in fixed_arrays(layer)]


def slot_caches(
    kinds: Sequence[str],
    arguments: Sequence[Mapping[str, Any]],
    owned: Mapping[int, LayerState],
    slots: int,
    context: int,
    device: torch.device | None = None,
) -> list[SlotCache]:
    """One cache per slot, as views of KV room [slots, heads, room, width] per block, which is allocated here."""
    stores = {
        number: _room(state, slots, context, device)
        for number, state in owned.items()
        if kinds[number] in (FULL, *WINDOWED)
    }
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


def _room(state: LayerState, slots: int, context: int, device: torch.device | None) -> tuple[torch.Tensor, ...]:
    """Memory for what a block keeps for each token: [slots, heads, room, width]."""
    return tuple(
        torch.empty(slots, kept.heads, state.room(context), kept.width, dtype=getattr(torch, kept.dtype), device=device)
        for kept in state.tokens
    )
