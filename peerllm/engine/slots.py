"""Who holds which slot of a stage and up to which position: every frame is checked against it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.errors import FrameError


@dataclass(slots=True)
class _Held:
    slot: int
    tokens: int = 0  # positions taken in, computed or waiting


class Slots:
    """Of one stage. A slot belongs to one sequence from its OPEN to its RELEASE, which arrive in this order."""

    def __init__(self, slots: int, context: int) -> None:
        self._count, self._context = slots, context
        self._held: dict[int, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._held

    @property
    def sequences(self) -> tuple[int, ...]:
        return tuple(self._held)

    def open(self, sequence: int, slot: int) -> None:
        """FrameError if the sequence is known already or the slot is taken or does not exist."""
        if sequence in self._held:
            raise FrameError(f"sequence {sequence} was opened twice")
        if not 0 <= slot < self._count:
            raise FrameError(f"slot {slot} does not exist; there are {self._count}")
        if any(held.slot == slot for held in self._held.values()):
            raise FrameError(f"slot {slot} is taken by another sequence")
        self._held[sequence] = _Held(slot)

    def extend(self, sequence: int, slot: int, position: int, length: int) -> None:
        """Takes in a run of an open sequence; FrameError unless it follows what the slot holds and fits the context."""
        held = self._held[sequence]
        if held.slot != slot:
            raise FrameError(f"sequence {sequence} holds slot {held.slot}, not {slot}")
        if position != held.tokens:
            raise FrameError(f"slot {slot} holds {held.tokens} positions; a run starting at {position} does not follow")
        if length < 1 or position + length > self._context:
            raise FrameError(f"positions {position}+{length} do not fit a context of {self._context}")
        held.tokens += length

    def release(self, sequence: int) -> int | None:
        """The slot that became free; None if the sequence holds none."""
        held = self._held.pop(sequence, None)
        return None if held is None else held.slot
