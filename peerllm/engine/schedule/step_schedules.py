"""Which steps enter the first stage as one batch, and when (ADR 9). Pure.

No stage merges or splits a batch of steps, so what is decided here, on the source, holds for the whole lap. When n
sequences decode, `batches_of` says how many batches are under way, each with an even share of them (n // batches, or
one more). When a batch comes back, the next one takes as many due steps as its share: a batch that was too large leaves
some for the batch after it, one that was too small takes up others that are due, first come first served. So batches of
any sizes are even again when each has come back twice. No step waits longer than the batches under way take to come
back (once more if a sequence ends meanwhile and fewer batches are right from then on).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import ScheduleName, batches_of


class NoBubble:
    """The next batch enters as soon as one is back, with whichever steps are due then."""

    def __init__(self, micro_batch: int, micro_batches: int) -> None:
        self._micro_batch, self._micro_batches = micro_batch, micro_batches
        self._due: deque[TokenRun] = deque()
        self._batches: dict[int, set[int]] = {}  # under way: number, the sequences still in it
        self._number = 0

    @property
    def under_way(self) -> int:
        """Batches of steps between the first stage and the head."""
        return len(self._batches)

    def due(self, step: TokenRun) -> None:
        """A sequence's next step may enter."""
        self._due.append(step)

    def waits(self, sequence: int) -> bool:
        """Whether the sequence's next step is due and has not entered."""
        return any(step.sequence == sequence for step in self._due)

    def left(self, sequence: int) -> None:
        """The sequence's step is back, or the sequence has ended. Unknown sequences are ignored."""
        self._due = deque(step for step in self._due if step.sequence != sequence)
        for number, members in self._batches.items():
            if sequence in members:
                members.remove(sequence)
                if not members:
                    del self._batches[number]
                return

    def steps(self, prompting: bool, prompts_under_way: bool) -> list[list[TokenRun]]:
        """The batches that enter now. `prompting`: prompts wait to be fed."""
        batches: list[list[TokenRun]] = []
        room = self._room()
        while self._due and len(batches) < room:
            batches.append(self._take())
        return batches

    def chunks(self, prompts_under_way: bool) -> int | None:
        """How many chunks of prompts may enter now; None: as many as their window holds."""
        return None

    def _room(self) -> int:
        """How many batches may enter now."""
        return self._count() - self.under_way

    def _decoding(self) -> int:
        return len(self._due) + sum(len(members) for members in self._batches.values())

    def _count(self) -> int:
        return batches_of(self._decoding(), self._micro_batch, self._micro_batches)

    def _take(self) -> list[TokenRun]:
        """The next batch: its even share of all who decode, or fewer if no more are due."""
        share, over = divmod(self._decoding(), self._count())
        larger = sum(len(members) > share for members in self._batches.values())
        size = min(share + (larger < over), len(self._due))
        batch = [self._due.popleft() for _ in range(size)]
        self._number += 1
        self._batches[self._number] = {step.sequence for step in batch}
        return batch


class Bubble(NoBubble):
    """EdgeShard's pipeline with a barrier: a round of batches enters when all of the round before it are back."""

    def _room(self) -> int:
        return 0 if self.under_way else self._count()


class Sequential(NoBubble):
    """One pass of one sequence at a time in the whole deployment; prompts' chunks and steps take turns."""

    def __init__(self, micro_batch: int, micro_batches: int) -> None:
        super().__init__(1, 1)
        self._stepped = False  # the last pass was a step

    def steps(self, prompting: bool, prompts_under_way: bool) -> list[list[TokenRun]]:
        if prompts_under_way or (prompting and self._stepped):
            return []
        batches = super().steps(prompting, prompts_under_way)
        self._stepped = self._stepped or bool(batches)
        return batches

    def chunks(self, prompts_under_way: bool) -> int | None:
        if prompts_under_way or self.under_way:
            return 0
        self._stepped = False
        return 1

    def _room(self) -> int:
        return 0 if self.under_way else 1


SCHEDULES: dict[ScheduleName, Callable[[int, int], NoBubble]] = {
    "sequential": Sequential,
    "bubble": Bubble,
    "no-bubble": NoBubble,
}
