"""Which steps enter the first stage as one batch, and when (ADR 9). Pure.

What enters together stays together: no stage merges or splits a batch of steps, so that what is decided here, on the
source, holds for the whole lap. Of n sequences that decode, as many batches as `batches_of` says are under way, each
with its even share (n // batches, or one more). A batch that is back has a seat for every one of its sequences; one too
large leaves the rest to the next, one too small is filled up first come first served. So batches of any sizes are
even again when each has been back twice, and no step waits longer than it takes the batches under way to come back
(once more if a sequence ends meanwhile and fewer batches are right from then on).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from peerllm.engine.schedule.batching import Piece
from peerllm.types import ScheduleName, batches_of


class NoBubble:
    """A batch goes on as soon as it is back; whoever is due then goes with it."""

    def __init__(self, micro_batch: int, micro_batches: int) -> None:
        self._micro_batch, self._micro_batches = micro_batch, micro_batches
        self._due: deque[Piece] = deque()
        self._batches: dict[int, set[int]] = {}  # under way: number, the sequences still in it
        self._number = 0

    @property
    def under_way(self) -> int:
        """Batches of steps between the first stage and the head."""
        return len(self._batches)

    def due(self, step: Piece) -> None:
        """A sequence's next step may enter."""
        self._due.append(step)

    def left(self, sequence: int) -> None:
        """Its step is back, or it has ended; unknown sequences are no matter."""
        self._due = deque(step for step in self._due if step.sequence != sequence)
        for number, members in self._batches.items():
            if sequence in members:
                members.remove(sequence)
                if not members:
                    del self._batches[number]
                return

    def steps(self, prompting: bool, prompts_under_way: bool) -> list[list[Piece]]:
        """The batches that enter now. `prompting`: prompts wait to be fed."""
        batches: list[list[Piece]] = []
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

    def _take(self) -> list[Piece]:
        """The next batch: its even share of all who decode, or fewer if no more are due."""
        share, over = divmod(self._decoding(), self._count())
        larger = sum(len(members) > share for members in self._batches.values())
        size = min(share + (larger < over), len(self._due))
        batch = [self._due.popleft() for _ in range(size)]
        self._number += 1
        self._batches[self._number] = {step.sequence for step in batch}
        return batch


class Bubble(NoBubble):
    """EdgeShard's pipeline with a barrier: a round of batches enters when the round before it is back as a whole."""

    def _room(self) -> int:
        return 0 if self.under_way else self._count()


class Sequential(NoBubble):
    """One pass of one sequence at a time in the whole deployment; prompts' chunks and steps take turns."""

    def __init__(self, micro_batch: int, micro_batches: int) -> None:
        super().__init__(1, 1)
        self._stepped = False  # the last pass was a step

    def steps(self, prompting: bool, prompts_under_way: bool) -> list[list[Piece]]:
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
