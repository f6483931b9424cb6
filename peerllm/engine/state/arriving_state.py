"""What has come of a slot's state from another shard, part by part, and where the next part goes. Pure.

A part is the rows of some consecutive tokens of one block, or what the block keeps once for a sequence. Parts of a
block follow each other; one that begins earlier replaces what lies there and after. A window takes its first part at
any token, and drops its oldest rows when its room is full, so that a sequence can be taken over while it goes on
elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from peerllm.engine import base
from peerllm.engine.base import StateForms, StatePart
from peerllm.engine.state.state_kinds import LayerState
from peerllm.errors import BadInputError


def state_forms(states: Mapping[int, LayerState], units: Sequence[range]) -> StateForms:
    """What a shard's blocks in `units` keep."""
    kept = {block: states[block] for unit in units for block in unit if block in states}
    tokens = {block: {a.name: (a.heads * a.width, a.dtype) for a in state.tokens} for block, state in kept.items()}
    fixed = {block: {a.name: (prod(a.shape), a.dtype) for a in state.fixed} for block, state in kept.items()}
    return StateForms(*({block: arrays for block, arrays in one.items() if arrays} for one in (tokens, fixed)))


def check_part(states: Mapping[int, LayerState], part: StatePart, context: int) -> bool:
    """Whether the part is of what a block keeps once; BadInputError unless it is that, or rows within the context."""
    state = states.get(part.block, LayerState())
    forms = state_forms({0: state}, [range(1)])
    fixed = part.rows.keys() == forms.fixed.get(0, {}).keys()
    wanted = (forms.fixed if fixed else forms.tokens).get(0, {})
    if not wanted or part.rows.keys() != wanted.keys():
        raise BadInputError(f"block {part.block} keeps no {sorted(part.rows)} here")
    count, most = part.length, 1 if fixed else state.room(context)
    if not 1 <= count <= most or not 0 <= part.start <= context - count:
        raise BadInputError(f"positions {part.start}+{count} do not fit a room of {most}")
    for name, (numbers, dtype) in wanted.items():
        rows = part.rows[name]
        if rows.shape != (count, numbers) or rows.dtype != np.dtype(dtype):
            raise BadInputError(f"{name} of block {part.block} are {dtype} {[count, numbers]}")
    return fixed


class ArrivingSlot:
    """The tokens whose rows lie in one slot so far, by block, and after which token what is kept once is."""

    def __init__(self, states: Mapping[int, LayerState], context: int) -> None:
        self._states, self._context = states, context
        self._ranges: dict[int, range] = {}  # the first row of a block's room is of the range's first token
        self._fixed = {number: 0 for number, state in states.items() if state.fixed}
        self._before = dict(self._fixed)  # the same of what came before that

    def place(self, part: StatePart) -> tuple[int, int] | None:
        """Take note of a part: (rows to drop from the front of the block's room, row at which the part goes then).

        None: it is of what the block keeps once. BadInputError if it does not fit or follow what came before.
        """
        if check_part(self._states, part, self._context):
            self._before[part.block], self._fixed[part.block] = self._fixed[part.block], part.start + 1
            return None
        state = self._states[part.block]
        known, start, stop = self._ranges.get(part.block, range(0)), part.start, part.start + part.length
        if not known.start <= start <= known.stop:
            if start and state.kept_tokens is None:
                raise BadInputError(f"{known.stop} tokens of block {part.block} are here, not those before {start}")
            known = range(start, start)
        kept = min(start - known.start, state.room(self._context) - part.length)
        self._ranges[part.block] = range(start - kept, stop)
        return start - known.start - kept, kept

    @property
    def snapshot(self) -> int:
        """After which token every block had what it keeps once, before that of a later one came; 0: there is none."""
        places = {place if place <= self._fixed[number] else 0 for number, place in self._before.items()}
        return places.pop() if len(places) == 1 else 0

    def settle(self) -> tuple[int, int, dict[int, int]]:
        """How many tokens every block holds, what Reach.allows takes as the furthest, by block the room's first token.

        No tokens if a window lacks some that it needs to go on. Blocks that keep nothing hold whatever there is.
        """
        kept = {number: state for number, state in self._states.items() if state.tokens}
        ends = [self._ranges[number].stop if number in self._ranges else 0 for number in kept]
        fixed = set(self._fixed.values())  # of a sequence that can be at one place only
        tokens = min([*ends, *fixed], default=0) if len(fixed) < 2 else 0
        if fixed and tokens not in fixed:
            tokens = 0
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
