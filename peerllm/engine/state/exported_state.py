"""A slot's state as named arrays, to take to another shard: which ones, of which shapes, follows from the layers. Pure.

An array is called "BLOCK.NAME", as "3.keys". A window has as many rows as its room holds, so that a sequence can go
back as far in the other shard; rows of tokens that it has dropped are zeros, and come first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.engine.state.state_kinds import LayerState
from peerllm.errors import BadInputError, EngineError

Arrays = dict[str, npt.NDArray[Any]]


def exported(states: Mapping[int, LayerState], position: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of each array, by name, of blocks that have taken in `position` tokens."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for number, state in states.items():
        for kept in state.tokens:
            found[f"{number}.{kept.name}"] = (kept.heads, state.room(position), kept.width), kept.dtype
        for fixed in state.fixed:
            found[f"{number}.{fixed.name}"] = fixed.shape, fixed.dtype
    return found


def check_imported(
    states: Mapping[int, LayerState], position: int, context: int, arrays: Mapping[str, npt.NDArray[Any]]
) -> None:
    """BadInputError unless `arrays` are what `exported` says, for a sequence of `position` tokens."""
    if not 0 < position <= context:
        raise BadInputError(f"a state of {position} tokens does not fit a slot of {context}")
    wanted = exported(states, position)
    if arrays.keys() != wanted.keys():
        raise BadInputError(f"a state has the arrays {sorted(wanted)}, not {sorted(arrays)}")
    for name, (shape, dtype) in wanted.items():
        if arrays[name].shape != shape or arrays[name].dtype != np.dtype(dtype):
            given = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            raise BadInputError(f"{name} of a state is {dtype} {list(shape)}, not {given}")


def chosen(states: Mapping[int, LayerState], blocks: Collection[int] | None) -> dict[int, LayerState]:
    """The states of some of a shard's blocks, None: of all; EngineError if it does not hold them."""
    if blocks is None:
        return dict(states)
    if missing := [number for number in blocks if number not in states]:
        raise EngineError(f"blocks {missing} are not held here")
    return {number: states[number] for number in blocks}
