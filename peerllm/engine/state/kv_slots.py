"""What a shard's layers keep of its sequences, in our own memory that the graphs read and write in place.

What is kept for each token lies in buffers [slots, heads, room, width], what is kept once for a sequence in buffers
[slots, ...]; a slot occupies one place along the first dimension. Sequences that step together must occupy neighbouring
places, so that their batch is a slice of the buffer. If they do not, slots are moved, which happens only when a batch's
members change. Layers with a window keep only the window: when a slot's room is full, its oldest tokens are dropped.

onnxruntime's operators read the whole state of a sequence before they write it (1.31: 4,536 runs of CausalConvWithState
and LinearAttention in place and apart were equal in every bit), so one buffer is input and output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.engine import base
from peerllm.engine.base import StatePart
from peerllm.engine.state.arriving_state import ArrivingSlot
from peerllm.engine.state.state_kinds import LayerState
from peerllm.errors import EngineError
from peerllm.transport.frames.token_run import TokenRun

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Group:
    """The buffers of layers with one size of window; a slot holds equally many tokens in all of them."""

    state: LayerState  # of one of the layers
    room: int
    slides: bool  # the room is smaller than the context
    held: list[int]  # by slot: how many of its sequence's last tokens are in the room
    stores: list[Array] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """The longest chunk that fits into the room together with the tokens that it attends to."""
        return self.room - self.state.seen(self.room) if self.slides else self.room

    def make_room(self, slot: int, place: int, position: int, count: int) -> None:
        """If `count` more tokens do not fit, drop the oldest ones, keeping what the window and a rollback need."""
        if (held := self.held[slot]) + count <= self.room:
            return
        kept = min(held, self.state.seen(position) + base.ROLLBACK_TOKENS, self.room - count)
        for store in self.stores:
            store[place, :, :kept] = store[place, :, held - kept : held].copy()
        self.held[slot] = kept


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the sequences of a pass lie: places from `first` on; `order[i]` is the run at place i."""

    first: int
    order: tuple[int, ...]
    last: tuple[Array, ...]  # int32 [places] for each group: where in the room the last token is
    total: tuple[Array, ...]  # int32 [1] for each group: the most tokens that any sequence has in the room


class KVSlots:
    """The slots of a shard. `stores` has each block's buffers by the names of graph inputs: "keys 3", "recurrent 0"."""

    def __init__(self, states: Mapping[int, LayerState], slots: int, context: int) -> None:
        self._lengths = [0] * slots
        self._place = list(range(slots))  # the place of each slot
        self._slot = list(range(slots))  # the slot at each place
        self._context, self.states = context, states
        self.groups: dict[int | None, Group] = {}
        self.stores: dict[str, Array] = {}
        self._fixed: list[Array] = []
        self._snapshots: list[Array] = []  # of those, by slot
        self._snapshot_of: dict[str, Array] = {}  # by the name in `stores`
        self._fixed_at: list[int | None] = [0] * slots  # the position that they stand at; None: a pass failed
        self._snapshot_at = [0] * slots  # 0: there is none
        self._arriving: dict[int, ArrivingSlot] = {}  # by slot
        for number, state in states.items():
            if state.tokens:
                room = state.room(context)
                group = Group(state, room, room < context, [0] * slots)
                group = self.groups.setdefault(state.window, group)
            for kept in state.tokens:
                store: Array = np.zeros((slots, kept.heads, room, kept.width), kept.dtype)
                self.stores[f"{kept.name} {number}"] = store
                group.stores.append(store)
            for fixed in state.fixed:
                store = np.zeros((slots, *fixed.shape), fixed.dtype)
                self.stores[f"{fixed.name} {number}"] = store
                self._fixed.append(store)
                copies = self._snapshot_of[f"{fixed.name} {number}"] = np.zeros_like(store)
                self._snapshots.append(copies)
        self.nbytes = sum(store.nbytes for store in (*self.stores.values(), *self._snapshots))

    @property
    def longest(self) -> int:
        """The longest chunk that fits at once, in all groups."""
        return min((group.longest for group in self.groups.values()), default=self._context)

    def check(self, runs: Sequence[TokenRun]) -> None:
        """EngineError unless every run has a slot of its own, which can go on from its position and has room."""
        if len({run.slot for run in runs}) < len(runs):
            raise EngineError("a sequence stands twice in a batch")
        for run in runs:
            slot, position = run.slot, run.position
            if not 0 <= slot < len(self._lengths) or position < 0:
                raise EngineError(f"there is no position {position} of a slot {slot}")
            if position > (length := self._lengths[slot]):
                raise EngineError(f"a gap in the sequence: {length} tokens are held, the next is for {position}")
            if position + run.length > self._context:
                raise EngineError(f"the slot's {self._context} tokens are full")
            if self._fixed and position and position not in (self._fixed_at[slot], self._snapshot_at[slot]):
                raise EngineError(f"a recurrent layer cannot go back to position {position}; replay the sequence")
            for group in self.groups.values():
                if position and group.held[slot] - (length - position) < group.state.seen(position):
                    raise EngineError(f"position {position} is too far back for a window; replay the sequence")

    def seek(self, runs: Sequence[TokenRun]) -> Batch:
        """Bring the slots to the positions of runs that were checked, side by side."""
        for run in runs:
            self._move(run.slot, run.position)
            self._fixed_at[run.slot] = None  # until the pass has gone well
        first, order = self._gather([run.slot for run in runs])
        lasts, totals = [], []
        for group in self.groups.values():
            for run in runs:
                group.make_room(run.slot, self._place[run.slot], run.position, run.length)
            ends = [group.held[runs[row].slot] + runs[row].length for row in order]
            lasts.append(np.array(ends, np.int32) - np.int32(1))
            totals.append(np.array([max(ends)], np.int32))
        return Batch(first, order, tuple(lasts), tuple(totals))

    def advance(self, runs: Sequence[TokenRun]) -> None:
        """A pass went well: what it wrote counts from now on."""
        for run in runs:
            self._lengths[run.slot] += run.length
            self._fixed_at[run.slot] = self._lengths[run.slot]
            for group in self.groups.values():
                group.held[run.slot] += run.length

    def keep_snapshot(self, slot: int) -> None:
        """Keep a copy of what the slot keeps once for its sequence, for a later run that begins at this position."""
        for store, copy in zip(self._fixed, self._snapshots, strict=True):
            copy[slot] = store[self._place[slot]]
        self._snapshot_at[slot] = self._lengths[slot]

    def held(self, slot: int, block: int) -> range:
        """The tokens whose rows a block has."""
        length = self._lengths[slot]
        return range(length - self.groups[self.states[block].window].held[slot], length)

    def part(self, slot: int, block: int, start: int, stop: int) -> StatePart:
        """A copy of the rows of tokens start..stop - 1; EngineError if the block does not have them all."""
        held, state = self.held(slot, block), self.states[block]
        if not held.start <= start < stop <= held.stop:
            raise EngineError(f"block {block} holds tokens {held.start}..{held.stop - 1}, not {start}..{stop - 1}")
        rows = slice(start - held.start, stop - held.start)
        stores = {kept.name: self.stores[f"{kept.name} {block}"][self._place[slot], :, rows] for kept in state.tokens}
        copies = {name: store.swapaxes(0, 1).copy() for name, store in stores.items()}
        return StatePart(block, start, {name: copy.reshape(len(copy), -1) for name, copy in copies.items()})

    def steady(self, slot: int) -> int:
        """The last position of which state can be taken while the sequence goes on."""
        return self._snapshot_at[slot] if self._fixed else self._lengths[slot]

    def fixed_part(self, slot: int, block: int, position: int) -> StatePart:
        """A copy of what a block keeps once; EngineError if it is not of that position, nor a snapshot of it."""
        if position < 1 or position not in (self._fixed_at[slot], self._snapshot_at[slot]):
            raise EngineError(f"there is no state after {position} tokens of slot {slot}")
        now = position == self._fixed_at[slot]
        names = [kept.name for kept in self.states[block].fixed]
        arrays = {name: self.stores[f"{name} {block}"][self._place[slot]] if now
                  else self._snapshot_of[f"{name} {block}"][slot] for name in names}  # fmt: skip
        return StatePart(block, position - 1, {name: array.reshape(1, -1).copy() for name, array in arrays.items()})

    def add(self, slot: int, part: StatePart) -> None:
        """Take in a part of a state for an empty slot; EngineError if it is not, BadInputError if it does not fit."""
        if self._lengths[slot]:
            raise EngineError(f"slot {slot} holds a sequence")
        arriving = self._arriving.setdefault(slot, ArrivingSlot(self.states, self._context))
        where, place = arriving.place(part), self._place[slot]
        if where is None:
            self._fixed_at[slot] = None  # until all of it has come
            for name, rows in part.rows.items():
                store, copies = self.stores[f"{name} {part.block}"], self._snapshot_of[f"{name} {part.block}"]
                copies[slot] = store[place]
                store[place] = rows.reshape(store.shape[1:])
            return
        (dropped, row), group = where, self.groups[self.states[part.block].window]
        for name, rows in part.rows.items():
            store = self.stores[f"{name} {part.block}"][place]
            if dropped:
                store[:, :row] = store[:, dropped : dropped + row].copy()
            store[:, row : row + part.length] = rows.reshape(part.length, *store.shape[::2]).swapaxes(0, 1)
        group.held[slot] = max(group.held[slot], row + part.length)  # they move with the slot's place

    def settle(self, slot: int) -> tuple[int, int]:
        """Let a sequence begin with what has arrived for its slot: (tokens that are complete, see ArrivingSlot)."""
        arriving = self._arriving.pop(slot, None)
        if arriving is None:
            raise EngineError(f"nothing has arrived for slot {slot}")
        tokens, furthest, starts = arriving.settle()
        firsts = {window: 0 for window in self.groups}
        for block, start in starts.items():
            window = self.states[block].window
            firsts[window] = max(firsts[window], start)  # layers of a group hold equally many tokens
        for block, start in starts.items():
            state = self.states[block]
            if late := firsts[state.window] - start:
                for kept in state.tokens:
                    store = self.stores[f"{kept.name} {block}"][self._place[slot]]
                    store[:, : tokens - start - late] = store[:, late : tokens - start].copy()
        self._lengths[slot], self._fixed_at[slot] = tokens, tokens or None
        self._snapshot_at[slot] = arriving.snapshot if tokens else 0
        for window, group in self.groups.items():
            group.held[slot] = tokens - firsts[window] if tokens else 0
        return tokens, furthest

    def release(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self._move(slot, 0)

    def close(self) -> None:
        """Free the memory. No slot can be used afterwards."""
        self._lengths.clear()
        self.groups.clear()
        self.stores.clear()
        self._fixed.clear()
        self._snapshots.clear()
        self._snapshot_of.clear()
        self._arriving.clear()

    def _move(self, slot: int, position: int) -> None:
        if not position:
            self._arriving.pop(slot, None)
        back = self._lengths[slot] - position
        for group in self.groups.values():
            group.held[slot] = max(group.held[slot] - back, 0) if position else 0
        self._lengths[slot] = position
        if position != self._fixed_at[slot]:
            for store, copy in zip(self._fixed, self._snapshots, strict=True):
                store[self._place[slot]] = copy[slot] if position else 0
            self._fixed_at[slot] = position
        if position < self._snapshot_at[slot]:
            self._snapshot_at[slot] = 0

    # ---- places -----------------------------------------------------------------------------------------------------

    def _gather(self, slots: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Move `slots` to neighbouring places: (the first place, for each place the index into `slots`)."""
        rows = {slot: row for row, slot in enumerate(slots)}
        places = sorted(self._place[slot] for slot in slots)
        first, count = places[0], len(places)
        if places[-1] - first != count - 1:
            first = self._best_range(set(places), count)
            wanted = range(first, first + count)
            away = [slot for slot in slots if self._place[slot] not in wanted]
            strangers = [place for place in wanted if self._slot[place] not in rows]
            for slot, place in zip(away, strangers, strict=True):
                self._swap(self._place[slot], place)
        return first, tuple(rows[self._slot[place]] for place in range(first, first + count))

    def _best_range(self, places: set[int], count: int) -> int:
        """The start of the `count` neighbouring places for which the fewest tokens must be moved."""
        starts = range(len(self._place) - count + 1)
        return min(starts, key=lambda start: (self._tokens_moved(places, start, count), start))

    def _tokens_moved(self, places: set[int], start: int, count: int) -> int:
        wanted = set(range(start, start + count))
        return sum(1 + self._lengths[self._slot[place]] for place in places ^ wanted)

    def _swap(self, one: int, other: int) -> None:
        """Swap the sequences at two places."""
        first, second = self._slot[one], self._slot[other]
        for group in self.groups.values():
            most = max(group.held[first], group.held[second])
            for store in group.stores:
                kept = store[one, :, :most].copy()
                store[one, :, :most] = store[other, :, :most]
                store[other, :, :most] = kept
        for store in self._fixed:
            store[[one, other]] = store[[other, one]]
        self._slot[one], self._slot[other] = second, first
        self._place[first], self._place[second] = other, one
