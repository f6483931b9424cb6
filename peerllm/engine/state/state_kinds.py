"""What layers keep of a sequence, as both engines declare it; planner, prefix reuse and export read only this. Pure.

A layer keeps numbers for every token (keys and values, or one latent vector that serves as both), all of them or those
of a window, and numbers of which there are equally many however long the sequence is (the last inputs of a convolution,
a recurrent state). The latter know the last position alone, so a sequence can go back only to a snapshot of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import ml_dtypes  # noqa: F401 (numpy then knows bfloat16)
import numpy as np

from peerllm.engine import base
from peerllm.engine.base import Reach

SNAPSHOTS = 1  # of a slot's fixed arrays: before the end of the prompt (see Reach)


@dataclass(frozen=True, slots=True)
class TokenArray:
    """Numbers that are kept for each token: [heads, tokens, width]."""

    name: str  # "keys", "values", "latent"
    heads: int
    width: int
    dtype: str  # numpy's name of it, as in SequenceArray

    @property
    def token_bytes(self) -> int:
        return self.heads * self.width * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class SequenceArray:
    """Numbers of a fixed shape that are kept once for a sequence; zeros before its first token."""

    name: str  # "convolution", "recurrent"
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class LayerState:
    """What one layer keeps of a sequence."""

    tokens: tuple[TokenArray, ...] = ()
    fixed: tuple[SequenceArray, ...] = ()
    window: int | None = None  # tokens that a query sees, itself included; None: all

    def __post_init__(self) -> None:
        names = [*(array.name for array in self.tokens), *(array.name for array in self.fixed)]
        if len(set(names)) < len(names):
            raise ValueError(f"a layer keeps two arrays of one name: {names}")

    @property
    def token_bytes(self) -> int:
        """Bytes for each token that is kept."""
        return sum(array.token_bytes for array in self.tokens)

    @property
    def sequence_bytes(self) -> int:
        """Bytes for each sequence whatever its length, snapshots included."""
        return (1 + SNAPSHOTS) * sum(array.nbytes for array in self.fixed)

    @property
    def kept_tokens(self) -> int | None:
        """The most tokens that are kept; None: all. Twice what a sequence may go back, so that rooms rarely slide."""
        return None if self.window is None or not self.tokens else self.window + 2 * base.ROLLBACK_TOKENS

    def room(self, context: int) -> int:
        """Tokens of room per slot."""
        return context if self.kept_tokens is None else min(context, self.kept_tokens)

    def seen(self, position: int) -> int:
        """How many earlier tokens the token at `position` attends to."""
        return position if self.window is None else min(position, self.window - 1)

    def nbytes(self, context: int) -> int:
        """Bytes of one slot."""
        return self.room(context) * self.token_bytes + self.sequence_bytes


def inseparable(makers: Sequence[int | None]) -> tuple[range, ...]:
    """Blocks as runs that no cut may part: a block uses the keys and values of the block `makers[number]`, if any."""
    ends = list(range(len(makers)))
    for user, maker in enumerate(makers):
        if maker is not None:
            ends[maker] = max(ends[maker], user)
    runs, start, last = [], 0, 0
    for number, end in enumerate(ends):
        last = max(last, end)
        if number == last:
            runs.append(range(start, number + 1))
            start = last = number + 1
    return tuple(runs)


def together(states: Iterable[LayerState], context: int) -> tuple[int, int | None, int]:
    """What several blocks keep, as one layer: bytes for each token, the most tokens kept, bytes for each sequence.

    `context`: the most tokens of a sequence.
    Where some keep a window and others everything, the windows count as if they were always full.
    """
    kept = list(states)
    rooms = {state.kept_tokens for state in kept if state.tokens}
    room = rooms.pop() if len(rooms) == 1 else None
    fixed = sum(state.sequence_bytes for state in kept)
    fixed += sum(state.room(context) * state.token_bytes for state in kept if state.kept_tokens != room)
    return sum(state.token_bytes for state in kept if state.kept_tokens == room), room, fixed


def slot_bytes(states: Iterable[LayerState], slots: int, context: int) -> int:
    """Bytes that layers take for all their slots."""
    return slots * sum(state.nbytes(context) for state in states)


def reach_of(states: Iterable[LayerState]) -> Reach:
    """Where sequences can be taken up again in all of a model's layers."""
    kept = list(states)
    rooms = [state.kept_tokens for state in kept if state.kept_tokens is not None]
    return Reach(not any(state.fixed for state in kept), min(rooms, default=None), base.ROLLBACK_TOKENS)


def keys_and_values(heads: int, width: int, dtype: str, window: int | None = None) -> LayerState:
    """The state of an attention layer whose keys and values are equally wide."""
    return LayerState((TokenArray("keys", heads, width, dtype), TokenArray("values", heads, width, dtype)), (), window)


def windows(states: Iterable[LayerState]) -> tuple[int | None, ...]:
    """The distinct windows of layers that keep something for each token, in order of appearance."""
    return tuple(dict.fromkeys(state.window for state in states if state.tokens))
