"""Which waiting batch this engine computes next. Pure: no clock, no threads.

Steps (one token of an answer) go before prompt chunks, and the oldest step goes first. Steps that came together are
computed together and with no others: the source alone decides how sequences are divided into batches
(step_schedules.py). Each chunk of a prompt is a batch by itself. Where one device holds several stages of a plan (the
source that also holds the head), the earlier stage computes its steps first: a token then goes from the head straight
into its next lap, and the two visits cost the pipeline no more than one (the simulator shows it). An unbroken stream of
steps cannot starve a prompt, because at most STEPS_PER_CHUNK batches of steps go before a waiting chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Generic, TypeVar

from peerllm.engine.wire.parcels import TokenBatch

STEPS_PER_CHUNK = 4  # batches of steps that may overtake a waiting prompt chunk, in a row

Key = TypeVar("Key", bound=Hashable)
Queue = deque[tuple[int, TokenBatch]]  # each batch after its number of arrival


@dataclass(slots=True)
class _StageQueues:
    """The batches that wait for one stage."""

    plan: Hashable  # the same for all stages of one plan
    place: int  # the stage's place in the plan's order
    steps: Queue = field(default_factory=deque)
    chunks: Queue = field(default_factory=deque)  # of one run each

    @property
    def tokens(self) -> int:
        return sum(run.length for queue in (self.steps, self.chunks) for _, batch in queue for run in batch.runs)


class Scheduler(Generic[Key]):
    """One for all stages of an engine; `next` hands out the batch to compute now."""

    def __init__(self) -> None:
        self._stages: dict[Key, _StageQueues] = {}
        self._arrivals = 0
        self._streak = 0  # batches of steps since a chunk was last served or none was waiting

    def add(self, stage: Key, plan: Hashable = None, place: int = 0) -> None:
        """Schedule for a stage; stages with the same `plan` are ordered by `place`."""
        self._stages[stage] = _StageQueues(stage if plan is None else plan, place)

    def remove(self, stage: Key) -> None:
        """Drop a stage with all that waits for it. Idempotent."""
        self._stages.pop(stage, None)

    def put(self, stage: Key, batch: TokenBatch) -> None:
        """Queue what came together: its steps as one batch, every other run as a chunk of its own.

        A step of a sequence of which a chunk still waits is queued behind that chunk.
        """
        queues = self._stages[stage]
        self._arrivals += 1
        prompts = {run.sequence for _, chunk in queues.chunks for run in chunk.runs}
        steps = [run for run in batch.runs if run.is_step and run.sequence not in prompts]
        if steps:
            queues.steps.append((self._arrivals, batch.only(steps)))
        if len(steps) < len(batch.runs):
            queues.chunks.extend((self._arrivals, batch.only([run])) for run in batch.runs if run not in steps)

    def drop(self, stage: Key, sequence: int) -> None:
        """Forget what waits of a sequence."""
        queues = self._stages[stage]
        queues.steps, queues.chunks = _without(queues.steps, sequence), _without(queues.chunks, sequence)

    def waiting(self, stage: Key) -> int:
        """How many tokens wait for a stage."""
        return self._stages[stage].tokens

    def next(self) -> tuple[Key, TokenBatch] | None:
        """The batch to compute now: steps of one stage that came together, or one chunk. None: nothing waits."""
        stepping = [(queues.steps[0][0], key) for key, queues in self._stages.items() if queues.steps]
        chunking = [(queues.chunks[0][0], key) for key, queues in self._stages.items() if queues.chunks]
        if chunking and (not stepping or self._streak >= STEPS_PER_CHUNK):
            self._streak = 0
            key = min(chunking, key=itemgetter(0))[1]
            return key, self._stages[key].chunks.popleft()[1]
        if not stepping:
            return None
        self._streak = self._streak + 1 if chunking else 0
        plan = self._stages[min(stepping, key=itemgetter(0))[1]].plan
        rivals = (key for _, key in stepping if self._stages[key].plan == plan)
        key = min(rivals, key=lambda key: self._stages[key].place)
        return key, self._stages[key].steps.popleft()[1]


def _without(queue: Queue, sequence: int) -> Queue:
    left = ((at, batch, [run for run in batch.runs if run.sequence != sequence]) for at, batch in queue)
    return deque((at, batch.only(runs)) for at, batch, runs in left if runs)
