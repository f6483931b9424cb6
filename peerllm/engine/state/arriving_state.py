"""What has come of a slot's state from another shard, part by part, and where the next part goes. Pure.

A part is the rows of some consecutive tokens of one block. Parts of a block follow each other; one that begins earlier
replaces what lies there and after. A window takes its first part at any token, and drops its oldest rows when its room
is full, so that a sequence can be taken over while it goes on elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peerllm.engine import base
from peerllm.engine.base import RowForms, StatePart
from peerllm.engine.state.state_kinds import LayerState
from peerllm.errors import BadInputError


def row_forms(states: Mapping[int, LayerState], units: Sequence[range]) -> RowForms:
    """What a shard's blocks in `units` keep of each token; nothing if the shard keeps what every token changes."""
    if any(state.fixed for state in states.values()):
        return {}
    kept = {block: states[block].tokens for unit in units for block in unit if block in states}
    return {
        block: {one.name: (one.heads * one.width, one.dtype) for one in arrays}
        for block, arrays in kept.items()
        if arrays
    }


def check_part(states: Mapping[int, LayerState], part: StatePart, context: int) -> LayerState:
    """The state of the part's block; BadInputError unless the part is rows of it within the context."""
    state = states.get(part.block)
    if state is None or not state.tokens:
        raise BadInputError(f"block {part.block} keeps nothing of a token here")
    if part.rows.keys() != {kept.name for kept in state.tokens}:
        raise BadInputError(f"block {part.block} keeps {[kept.name for kept in state.tokens]}, not {list(part.rows)}")
    count = part.length
    if not 1 <= count <= state.room(context) or not 0 <= part.start <= context - count:
        raise BadInputError(f"positions {part.start}+{count} do not fit a room of {state.room(context)}")
    for kept in state.tokens:
        rows, wanted = part.rows[kept.name], (count, kept.heads * kept.width)
        if rows.shape != wanted or rows.dtype != np.dtype(kept.dtype):
            raise BadInputError(f"{kept.name} of block {part.block} are {kept.dtype} {list(wanted)}")
    return state


class ArrivingSlot:
    """The tokens whose rows lie in one slot so far, by block."""

    def __init__(self, states: Mapping[int, LayerState], context: int) -> None:
        self._states, self._context = states, context
        self._ranges: dict[int, range] = {}  # the first row of a block's room is of the range's first token

    def place(self, part: StatePart) -> tuple[int, int]:
        """(Rows to drop from the front of the block's room, row at which the part goes then), which counts as done.

        BadInputError if the part does not fit, or does not follow what came before.
        """
        state = check_part(self._states, part, self._context)
        known, start, stop = self._ranges.get(part.block, range(0)), part.start, part.start + part.length
        if not known.start <= start <= known.stop:
            if start and state.kept_tokens is None:
                raise BadInputError(
                    f"{known.stop} tokens of block {part.block} are here, a part from {start} does not follow"
                )
            known = range(start, start)
        kept = min(start - known.start, state.room(self._context) - part.length)
        self._ranges[part.block] = range(start - kept, stop)
        return start - known.start - kept, kept

    def settle(self) -> tuple[int, int, dict[int, int]]:
        """How many tokens every block holds, what Reach.allows takes as the furthest, by block the room's first token.

        No tokens if a window lacks some that it needs to go on. Blocks that keep nothing hold whatever there is.
        """
        kept = {number: state for number, state in self._states.items() if state.tokens}
        tokens = min((self._ranges[number].stop if number in self._ranges else 0 for number in kept), default=0)
        starts = {number: self._ranges[number].start for number in kept} if tokens else {}
        furthest = tokens
        for number, start in starts.items():
            state = kept[number]
            if tokens - start < state.seen(tokens):
                return 0, 0, {}
            if start:  # as if the room had been full until so far
                least = start + state.seen(self._context) + base.ROLLBACK_TOKENS
                furthest = max(furthest, least, state.room(self._context) + 1)
        return tokens, furthest, starts
