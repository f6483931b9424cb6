"""Which waiting work this engine computes next (design §5.4). Pure: no clock, no threads.

Pieces are runs of one sequence's tokens. Steps (one token of an answer) go before prompt chunks, oldest first. Steps
that came together are computed together and with no others: the source alone decides how sequences are divided into
batches (step_schedules.py). A chunk of a prompt is a batch by itself. Of a plan's stages on one device (the source
with the head) the earlier computes its steps first: a token then goes from the head straight into its next lap, and the
two visits cost the pipeline no more than one (the simulator shows it). So that an unbroken stream of steps cannot
starve a prompt, a chunk follows at most STEPS_PER_CHUNK batches of steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Generic, TypeVar

STEPS_PER_CHUNK = 4  # batches of steps that may overtake a waiting prompt chunk, in a row

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A run of one sequence's tokens at a stage: `data` is int64 [length] at layer 0, else [length, hidden]."""

    sequence: int
    slot: int
    position: int
    length: int
    sample: bool  # the head picks a token after the last of them
    data: Any  # Tensor; None in what only names a run


@dataclass(slots=True)
class _Waiting:
    """What waits for one stage, each piece with its number of arrival."""

    plan: Hashable  # stages of one plan share it ...
    place: int  # ... and are told apart by their order
    steps: deque[tuple[int, list[Piece]]] = field(default_factory=deque)  # batches
    chunks: deque[tuple[int, Piece]] = field(default_factory=deque)


class Scheduler(Generic[Key]):
    """All stages of an engine share one: `next` hands out the batch to compute now."""

    def __init__(self) -> None:
        self._stages: dict[Key, _Waiting] = {}
        self._arrivals = 0
        self._streak = 0  # batches of steps since a chunk was last served or none was waiting

    def add(self, stage: Key, plan: Hashable = None, place: int = 0) -> None:
        """`plan` and `place`: stages of one plan in their order."""
        self._stages[stage] = _Waiting(stage if plan is None else plan, place)

    def remove(self, stage: Key) -> None:
        self._stages.pop(stage, None)

    def put(self, stage: Key, *pieces: Piece) -> None:
        """What came together. One token to sample after is a step, unless a chunk of its own prompt waits before it."""
        waiting = self._stages[stage]
        self._arrivals += 1
        prompts = {piece.sequence for _, piece in waiting.chunks}
        steps = [piece for piece in pieces if piece.sample and piece.length == 1 and piece.sequence not in prompts]
        if steps:
            waiting.steps.append((self._arrivals, steps))
        waiting.chunks.extend((self._arrivals, piece) for piece in pieces if piece not in steps)

    def drop(self, stage: Key, sequence: int) -> None:
        """Forget what waits of a sequence."""
        waiting = self._stages[stage]
        left = ((at, [piece for piece in batch if piece.sequence != sequence]) for at, batch in waiting.steps)
        waiting.steps = deque(entry for entry in left if entry[1])
        waiting.chunks = deque(entry for entry in waiting.chunks if entry[1].sequence != sequence)

    def waiting(self, stage: Key) -> int:
        """How many tokens wait for a stage."""
        waiting = self._stages[stage]
        return sum(len(batch) for _, batch in waiting.steps) + sum(piece.length for _, piece in waiting.chunks)

    def next(self) -> tuple[Key, list[Piece]] | None:
        """The batch to compute now: steps of one stage that came together, or one chunk. None: nothing waits."""
        stepping = [(waiting.steps[0][0], key) for key, waiting in self._stages.items() if waiting.steps]
        chunking = [(waiting.chunks[0][0], key) for key, waiting in self._stages.items() if waiting.chunks]
        if chunking and (not stepping or self._streak >= STEPS_PER_CHUNK):
            self._streak = 0
            key = min(chunking, key=itemgetter(0))[1]
            return key, [self._stages[key].chunks.popleft()[1]]
        if not stepping:
            return None
        self._streak = self._streak + 1 if chunking else 0
        plan = self._stages[min(stepping, key=itemgetter(0))[1]].plan
        rivals = (key for _, key in stepping if self._stages[key].plan == plan)
        key = min(rivals, key=lambda key: self._stages[key].place)
        return key, self._stages[key].steps.popleft()[1]
