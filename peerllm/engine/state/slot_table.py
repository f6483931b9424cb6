"""Which sequence holds which slot of a stage, and how many tokens of it: every run is checked against it. Pure.

An idle slot keeps what an ended sequence left in it, for another to begin with.
"""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.errors import FrameError
from peerllm.transport.frames.token_run import TokenRun


@dataclass(slots=True)
class _HeldSlot:
    slot: int
    tokens: int = 0  # positions taken in, computed or waiting


class SlotTable:
    """The slots of one stage. A sequence holds one from its OPEN to its RELEASE, which arrive in this order."""

    def __init__(self, slots: int, context: int) -> None:
        self._count, self._context = slots, context
        self._held: dict[int, _HeldSlot] = {}
        self._idle: dict[int, int] = {}  # by slot: tokens kept

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._held

    @property
    def sequences(self) -> tuple[int, ...]:
        return tuple(self._held)

    @property
    def idle(self) -> tuple[int, ...]:
        """Slots that nobody holds and that are not empty."""
        return tuple(self._idle)

    def open(self, sequence: int, slot: int, position: int = 0) -> None:
        """A sequence begins with the first `position` tokens that an idle slot keeps.

        FrameError if it is known already, or the slot is taken, does not exist or keeps fewer.
        """
        if sequence in self._held:
            raise FrameError(f"sequence {sequence} was opened twice")
        if not 0 <= slot < self._count:
            raise FrameError(f"slot {slot} does not exist; there are {self._count}")
        if any(held.slot == slot for held in self._held.values()):
            raise FrameError(f"slot {slot} is taken by another sequence")
        if not 0 <= position <= self._idle.get(slot, 0):
            raise FrameError(f"slot {slot} keeps {self._idle.get(slot, 0)} tokens; no sequence begins at {position}")
        self._idle.pop(slot, None)
        self._held[sequence] = _HeldSlot(slot, position)

    def extend(self, run: TokenRun) -> None:
        """Take in a run of an open sequence; FrameError unless it follows what the slot holds and fits the context."""
        held = self._held[run.sequence]
        if held.slot != run.slot:
            raise FrameError(f"sequence {run.sequence} holds slot {held.slot}, not {run.slot}")
        if run.position != held.tokens:
            raise FrameError(f"slot {run.slot} holds {held.tokens} tokens; a run from {run.position} does not follow")
        if run.length < 1 or run.position + run.length > self._context:
            raise FrameError(f"positions {run.position}+{run.length} do not fit a context of {self._context}")
        held.tokens += run.length

    def release(self, sequence: int, keep: int = 0) -> int | None:
        """The slot that became free; None if the sequence holds none.

        With `keep`, the slot is idle and keeps the sequence's first `keep` tokens, if the sequence took in so many.
        """
        held = self._held.pop(sequence, None)
        if held is None:
            return None
        if 0 < keep <= held.tokens:
            self._idle[held.slot] = keep
        return held.slot

    def empty(self, slot: int) -> None:
        """Forget what an idle slot keeps."""
        self._idle.pop(slot, None)
