"""KV slots for packed rows, and the cache that writes each segment's keys and values into its slot.

Blocks that keep equally many tokens are a group: they move in step, so where a segment lies is worked out once for all.
A slot's room holds the last tokens of its sequence from its front on; a window's room slides when it is full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from peerllm.engine import states
from peerllm.engine.base import Segment
from peerllm.engine.cache import kv_bytes, make_stores
from peerllm.engine.place import CPU
from peerllm.engine.states import LayerState
from peerllm.errors import EngineError


@dataclass(slots=True)
class View:
    """See attention.View; `low` to `high` is what its tokens may see of the slot's room."""

    slot: int
    start: int
    length: int
    low: int
    high: int
    mask: torch.Tensor | None
    causal: bool


@dataclass(slots=True)
class Group:
    """Blocks of one window, whose slots have the same room."""

    window: int | None
    room: int
    context: int
    held: list[int]  # by slot: tokens in the room
    device: torch.device = CPU
    stores: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    row: list[View] = field(default_factory=list)  # of the pass at work
    places: dict[int, torch.Tensor] = field(default_factory=dict)  # by heads: where the row's tokens go, flat

    @property
    def longest(self) -> int:
        """Tokens of a segment that surely fit in beside what they see."""
        return self.context if self.window is None or self.room == self.context else self.room - self.window + 1

    def seen(self, position: int) -> int:
        """Tokens before `position` that the one there sees."""
        return position if self.window is None else min(position, self.window - 1)

    def make_room(self, slot: int, position: int, count: int) -> None:
        """Slide, if the room is full: keep what the window and a rollback need, so that the next slide is far."""
        if (held := self.held[slot]) + count <= self.room:
            return
        kept = min(held, self.seen(position) + states.ROLLBACK_TOKENS, self.room - count)
        assert kept >= self.seen(position)
        for store in (store for pair in self.stores for store in pair):
            store[slot, :, :kept] = store[slot, :, held - kept : held].clone()
        self.held[slot] = kept

    def plan(self, segments: Sequence[Segment], dtype: torch.dtype) -> None:
        """Where the tokens of a row go and what they see; room was made."""
        self.row, self.places, start = [], {}, 0
        for segment in segments:
            seen, length, held = self.seen(segment.position), segment.length, self.held[segment.slot]
            mask, causal = None, False
            if length > 1:
                causal = seen == 0 and (self.window is None or length <= self.window)
                mask = None if causal else self._mask(seen, length, dtype)
            self.row.append(View(segment.slot, start, length, held - seen, held + length, mask, causal))
            start += length

    def _mask(self, seen: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """[length, seen + length]: 0 where a token sees another, else minus infinity."""
        mask = torch.full((length, seen + length), float("-inf"), dtype=dtype, device=self.device).triu_(seen + 1)
        if self.window is not None and seen + length > self.window:
            mask += torch.full_like(mask, float("-inf")).tril_(seen - self.window)
        return mask

    def place(self, heads: int) -> torch.Tensor:
        """int64 [tokens * heads]: where each token's heads go in a store seen as [slots * heads * room, width]."""
        if heads not in self.places:
            first = [
                view.slot * heads * self.room + place
                for view in self.row
                for place in range(view.high - view.length, view.high)
            ]
            of_head = torch.arange(0, heads * self.room, self.room)
            self.places[heads] = (torch.tensor(first).unsqueeze(1) + of_head).view(-1).to(self.device)
        return self.places[heads]


class PackedCache(Cache):
    """What a model takes for its cache while it computes a packed row; `attention` asks it for the views."""

    def __init__(self, numbers: Mapping[int, Group], stores: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(layers=[])
        self._numbers, self._stores = numbers, stores
        self._at: tuple[int, Any, Any] | None = None  # the block at work and what it stored

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise EngineError("a packed row has no one length")

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Keys and values [1, heads, n, width] of a row go to their slots, and come back as they are."""
        group = self._numbers[layer_idx]
        for store, new in zip(self._stores[layer_idx], (key_states, value_states), strict=True):
            if len(group.row) == 1:
                view = group.row[0]
                store[view.slot, :, view.high - view.length : view.high] = new[0]
            else:
                heads, width = store.shape[1], store.shape[3]
                flat = new[0].transpose(0, 1).reshape(-1, width)
                store.view(-1, width).index_copy_(0, group.place(heads), flat)
        self._at = layer_idx, key_states, value_states
        return key_states, value_states

    def views(self, keys: torch.Tensor, values: torch.Tensor) -> list[tuple[View, torch.Tensor, torch.Tensor]]:
        """What each segment sees in the block at work: views of the slots, [1, heads, tokens, width]."""
        if self._at is None or self._at[1] is not keys or self._at[2] is not values:
            raise EngineError("attention is over other keys and values than those stored")
        number, self._at = self._at[0], None
        key_store, value_store = self._stores[number]
        return [(view, _cut(key_store, view), _cut(value_store, view)) for view in self._numbers[number].row]


def _cut(store: torch.Tensor, view: View) -> torch.Tensor:
    _, heads, room, width = store.shape
    return store.as_strided(
        (1, heads, view.high - view.low, width),
        (heads * room * width, room * width, width, 1),
        (view.slot * heads * room + view.low) * width,
    )


class PackedSlots:
    """KV room of a shard whose every block keeps keys and values: [slots, heads, room, width] each, made at once."""

    def __init__(
        self,
        owned: Mapping[int, LayerState],
        slots: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        self.kv_bytes, self.count = kv_bytes(owned, slots, context), slots
        self._lengths = [0] * slots
        self._dtype = dtype
        groups: dict[tuple[int | None, int], Group] = {}
        numbers, stores = {}, make_stores(owned, slots, context, device)
        for number, state in owned.items():
            key = state.window, state.room(context)
            numbers[number] = group = groups.setdefault(key, Group(*key, context, [0] * slots, device))
            group.stores.append(stores[number])
        self._groups = list(groups.values())
        self._cache = PackedCache(numbers, stores)

    def rows(self, segments: Sequence[Segment]) -> list[list[tuple[int, Segment]]]:
        """Segments, each with its start in the row, as rows to compute one after the other: almost always one.

        A slot stands in a row once; a segment longer than a window's room takes goes in pieces.
        """
        longest = min((group.longest for group in self._groups), default=None)
        rows: list[list[tuple[int, Segment]]] = []
        taken: dict[int, int] = {}  # by slot: rows that have it
        start = 0
        for segment in segments:
            done = 0
            while done < segment.length:
                count = min(segment.length - done, longest or segment.length)
                last = done + count == segment.length
                piece = Segment(segment.slot, segment.position + done, count, segment.sample and last)
                number = taken.get(segment.slot, 0)
                if number == len(rows):
                    rows.append([])
                rows[number].append((start + done, piece))
                taken[segment.slot], done = number + 1, done + count
            start += segment.length
        return rows

    def seek(self, segments: Sequence[Segment]) -> PackedCache:
        """Bring the slots of a row to their segments' positions, with room; EngineError before any has moved."""
        for segment in segments:
            self._check(segment.slot, segment.position)
        for segment in segments:
            self._move(segment.slot, segment.position)
            for group in self._groups:
                group.make_room(segment.slot, segment.position, segment.length)
        for group in self._groups:
            group.plan(segments, self._dtype)
        return self._cache

    def advance(self, segments: Sequence[Segment]) -> None:
        """A row went well: what it wrote counts from now on."""
        for segment in segments:
            self._lengths[segment.slot] += segment.length
            for group in self._groups:
                group.held[segment.slot] += segment.length
        for group in self._groups:
            group.row, group.places = [], {}  # masks can be large

    def release(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self._move(slot, 0)

    def _check(self, slot: int, position: int) -> None:
        length = self._lengths[slot]
        if position > length:
            raise EngineError(f"a gap in the sequence: {length} tokens are held, the next is for {position}")
        for group in self._groups:
            if position and group.held[slot] - (length - position) < group.seen(position):
                raise EngineError(f"position {position} is too far back for a window; replay the sequence")

    def _move(self, slot: int, position: int) -> None:
        back = self._lengths[slot] - position
        for group in self._groups:
            group.held[slot] = max(group.held[slot] - back, 0) if position else 0
        self._lengths[slot] = position

    def close(self) -> None:
        """Free the room."""
        self._groups.clear()
        self._cache = PackedCache({}, {})
