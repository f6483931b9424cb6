"""The engine's one seam: what a compute backend offers.

A backend knows layers, positions and slots. It does not know what a token means beyond its id, nor what a device is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from peerllm.engine.messages import Facts, Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling

ROLLBACK_TOKENS = 64  # how far a sequence can go back in layers that keep only a window
Tensor = npt.NDArray[Any]  # C-contiguous; bfloat16 is ml_dtypes'
Floats = npt.NDArray[np.float32]
RowForms = Mapping[int, Mapping[str, tuple[int, str]]]  # by block: array: (numbers in a row, numpy's name of the dtype)


@dataclass(frozen=True, slots=True)
class Draw:
    """What the head needs to pick one token: how, at which position, and the answer so far (for penalties)."""

    sampling: Sampling
    position: int
    answer: Sequence[int]
    mask: bytes | None = None  # a bit for each token id, the lowest first: whether it may be picked; None: all may


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a slot's sequence can be taken up again in all blocks of a model, whichever stages hold them."""

    rewinds: bool  # False: some layers know the last position alone, and those of which they keep a snapshot
    room: int | None = None  # tokens that the narrowest window's slot keeps; None: no block forgets a token
    slack: int = 0  # tokens behind those that a window needs which are left when a slot's room is full
    snapshots: bool = True  # False: layers that do not rewind cannot keep a snapshot either

    def allows(self, position: int, furthest: int, known: Collection[int] = ()) -> bool:
        """Whether a slot can go on from `position`; `furthest` is the most it has held since it began afresh.

        The slack counts from there: going back does not bring back what was dropped. `known` are the positions for
        which the layers that do not rewind have their states.
        """
        if not self.rewinds and position not in known:
            return False
        return self.room is None or furthest <= self.room or furthest - position <= self.slack


@dataclass(frozen=True, slots=True, eq=False)
class StatePart:
    """Rows [tokens, numbers] by array of what a block keeps of the tokens from `start` on.

    Or what it keeps once for a sequence: one row, as it is after the token `start`.
    """

    block: int
    start: int
    rows: Mapping[str, Tensor]

    @property
    def length(self) -> int:
        return len(next(iter(self.rows.values())))


@dataclass(frozen=True, slots=True)
class StateForms:
    """What can be taken of blocks' state in parts: what they keep of each token, and what they keep of a sequence."""

    tokens: RowForms
    fixed: RowForms


class Shard(Protocol):
    """Layers first..last of a model, loaded, with KV room for `slots` sequences of `context` tokens.

    A shard with layer 0 takes token ids (int64 [n]); any other takes hidden states ([n, hidden]).
    A shard without the head returns hidden states ([n, hidden]); one with the head returns logits (float32
    [number of runs with sample, vocabulary]), in the order of the runs. A batch is either single tokens of several
    sequences or one chunk of one prompt. Arrays may be read-only.
    """

    hidden_size: int  # numbers in a row that comes in, or of layer 0 in one that goes out; none that goes out is longer
    vocabulary: int  # token ids go from 0 to one less
    weight_bytes: int
    weights: Mapping[int, int]  # bytes by tensor; what two shards of one process share has the same key in both
    kv_bytes: int
    reach: Reach | None  # where sequences can be taken up again, in the whole model; None: nowhere but at the start
    form: str  # only shards of one form understand each other's state

    def forward(self, inputs: Tensor, runs: Sequence[TokenRun]) -> Tensor: ...
    def release(self, slot: int) -> None: ...

    def last_states(self, inputs: Tensor, run: TokenRun) -> Floats:
        """As `forward` with one run, of a shard with the head: what its matrix is given, of all tokens, [n, hidden]."""
        ...

    def state_forms(self, first_layer: int, last_layer: int) -> StateForms:
        """Of its blocks that are of these layers."""
        ...

    def held(self, slot: int, block: int) -> range:
        """The tokens whose rows `export_part` can copy."""
        ...

    def steady(self, slot: int) -> int:
        """The last position of which state can be taken while the sequence goes on: its end, or its snapshot."""
        ...

    def export_part(self, slot: int, block: int, start: int, stop: int) -> StatePart:
        """A copy of the rows of tokens start..stop - 1; EngineError if they are not all held."""
        ...

    def export_fixed(self, slot: int, block: int, position: int) -> StatePart:
        """A copy of what the block keeps once for the sequence, after `position` tokens; EngineError if it has not."""
        ...

    def import_part(self, slot: int, part: StatePart) -> None:
        """Take in a part of a sequence's state. Nothing moves if it raises.

        EngineError: the slot is not empty. BadInputError: the part does not fit, or does not follow what came before.
        """
        ...

    def settle(self, slot: int) -> tuple[int, int]:
        """The tokens of which every block has its rows by now, and what Reach.allows takes as the furthest of them.

        The slot holds those from now on, and takes no parts.
        """
        ...

    def close(self) -> None: ...


# Picks tokens from logits ([k, vocabulary]), one per draw; the same for the same draw and logits.
Sampler = Callable[[Floats, Sequence[Draw]], list[int]]
Progress = Callable[[int, int], None]  # done bytes, total bytes


class Backend(Protocol):
    """All but `sampler` run in the loader thread or a helper's, not in the compute thread."""

    sampler: Sampler

    @property
    def broken(self) -> tuple[type[BaseException], ...]:
        """Errors after which this process must be restarted."""
        ...

    def facts(self, compute: str = "cpu", threads: int = 1) -> Facts:
        """Before all else; `compute` and `threads` say where from now on. BadInputError if that is not here."""
        ...

    def load(self, spec: LoadStage, progress: Progress) -> Shard: ...
    def inspect(self, message: Inspect) -> Inspected: ...
    def measure(self, message: Measure) -> Measured: ...

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        """`check` is called before every pass; it raises to stop the timing."""
        ...
