"""Which sequence holds which slot of a shard, how many tokens of it, and in which epoch it is computed. Pure.

A shard may belong to stages of several epochs. A sequence is computed in one of them at a time, and frames of another
one came late: they are dropped. What a sequence left in its slot stays for another to begin with, and a shard that was
without work for some epochs still has what it had: it is found again by the sequence's number.
"""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.engine.base import Reach
from peerllm.errors import FrameError
from peerllm.transport.frames.token_run import TokenRun


@dataclass(slots=True)
class _HeldSlot:
    sequence: int
    slot: int
    epoch: int
    tokens: int = 0  # positions taken in, computed or waiting: the next run begins here
    computed: int = 0  # of the sequence's tokens, so many are in the layers; more than `tokens` after going back
    furthest: int = 0  # the most that were since it began afresh
    snapshot: int = 0  # the position of which recurrent layers keep a snapshot; 0: none
    short: bool = False  # it was to go on where it cannot: runs from there came too early
    idle: bool = False  # the sequence has ended
    attempt: int = 0  # the number of its last OPEN; they rise over all sequences and epochs


class SlotTable:
    """The slots of one shard. A sequence holds one from its OPEN to its RELEASE, which arrive in this order."""

    def __init__(self, slots: int, context: int, reach: Reach | None = None) -> None:
        self._count, self._context, self._reach = slots, context, reach
        self._by_slot: dict[int, _HeldSlot] = {}
        self._held: dict[int, _HeldSlot] = {}  # by sequence; of those that have not ended

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._held

    def in_use(self, epoch: int) -> int:
        """How many sequences are computed in an epoch."""
        return sum(held.epoch == epoch for held in self._held.values())

    def kept(self, slot: int) -> int:
        """How many tokens an idle slot keeps for another sequence to begin with."""
        held = self._by_slot.get(slot)
        return held.tokens if held is not None and held.idle else 0

    def standing(self, sequence: int, slot: int) -> set[int]:
        """The sequences of which something may wait that an OPEN for this sequence and slot makes void."""
        there = self._by_slot.get(slot)
        return ({sequence} & self._held.keys()) | (set() if there is None or there.idle else {there.sequence})

    def is_late(self, sequence: int, slot: int, attempt: int) -> bool:
        """Whether a later OPEN than that of this number has come for the sequence, or for another in its slot."""
        there, own = self._by_slot.get(slot), self._held.get(sequence)
        if own is not None and own.attempt == attempt > 0:
            return True
        return any(other is not None and other.attempt > attempt for other in (there, own))

    def enter(
        self, sequence: int, slot: int, position: int = 0, epoch: int = 0, after: int = 0, attempt: int = 0
    ) -> int:
        """A sequence begins in an epoch, or goes on there, after its first `position` tokens; not if that `is_late`.

        They are its own, or those of the ended sequence `after`, whose text begins with the same ones. Returns
        `position`, or where it can go on of what the layers hold, if that is less. Another sequence in the slot has
        ended, though its RELEASE did not come. FrameError if the slot does not exist.
        """
        if not 0 <= slot < self._count:
            raise FrameError(f"slot {slot} does not exist; there are {self._count}")
        there, own = self._by_slot.get(slot), self._held.get(sequence)
        mine = there if there is not None and there.sequence in (sequence, after) else None
        for other in (own, there):
            if other is not None and other is not mine:
                self._forget(other)
        if mine is None:
            mine = self._by_slot[slot] = _HeldSlot(sequence, slot, epoch)
        self._held.pop(mine.sequence, None)
        self._held[sequence] = mine
        found = self._place(mine, position)
        mine.sequence, mine.epoch, mine.attempt, mine.tokens, mine.idle = sequence, epoch, attempt, found, False
        mine.short = found < position
        return found

    def follows(self, run: TokenRun, epoch: int = 0) -> bool:
        """Whether a run is due; False if it came late, twice or for a sequence that is not computed here.

        FrameError if tokens before it are missing, or the slot is not the sequence's.
        """
        held = self._held.get(run.sequence)
        if held is None or held.epoch != epoch or run.position < held.tokens:
            return False
        if held.slot != run.slot:
            raise FrameError(f"sequence {run.sequence} holds slot {held.slot}, not {run.slot}")
        if run.position > held.tokens:
            if held.short:
                return False
            raise FrameError(f"slot {run.slot} holds {held.tokens} tokens; a run from {run.position} does not follow")
        if run.length < 1 or run.position + run.length > self._context:
            raise FrameError(f"positions {run.position}+{run.length} do not fit a context of {self._context}")
        return True

    def extend(self, run: TokenRun, epoch: int = 0) -> bool:
        """Take in a run, if it `follows`."""
        due = self.follows(run, epoch)
        if due:
            self._held[run.sequence].tokens += run.length
        return due

    def computed(self, run: TokenRun) -> None:
        """A run that was taken in has passed the layers."""
        held = self._held.get(run.sequence)
        if held is not None:
            end = held.computed = run.position + run.length
            if end > held.furthest or not run.position:
                held.furthest = end
            if run.snapshot:
                held.snapshot = end
            elif run.position < held.snapshot:
                held.snapshot = 0

    def adopt(self, sequence: int, slot: int, epoch: int, tokens: int, furthest: int, steady: int = 0) -> None:
        """The layers were given a sequence's state after its first `tokens` tokens, by another shard.

        `furthest` is what that one had held at most; of layers that cannot go back, `steady` is where they keep a
        snapshot. Frames of the sequence are taken in from its next OPEN on.
        """
        for other in (self._held.get(sequence), self._by_slot.get(slot)):
            if other is not None:
                self._forget(other)
        made = _HeldSlot(sequence, slot, epoch, tokens, tokens, max(tokens, furthest), steady)
        self._held[sequence] = self._by_slot[slot] = made

    def holding(self, epoch: int) -> list[tuple[int, int, int, int]]:
        """(sequence, slot, tokens computed, the most it has held) of each sequence that is computed in an epoch."""
        found = (held for held in self._held.values() if held.epoch == epoch)
        return [(held.sequence, held.slot, held.computed, held.furthest) for held in found]

    def holds(self, sequence: int, slot: int, epoch: int | None = None) -> bool:
        """Whether a sequence is computed in this slot, in an epoch if one is given."""
        held = self._held.get(sequence)
        return held is not None and held.slot == slot and epoch in (None, held.epoch)

    def taken(self, slot: int) -> bool:
        """Whether a slot is a sequence's, or keeps what an ended one left."""
        return slot in self._by_slot

    def release(self, sequence: int, keep: int = 0, epoch: int | None = None) -> int | None:
        """The slot that became free; None if the sequence holds none, or is computed in another epoch.

        With `keep`, the slot is idle and keeps the sequence's first `keep` tokens, if the layers have so many.
        """
        held = self._held.get(sequence)
        if held is None or epoch not in (None, held.epoch):
            return None
        if 0 < keep <= held.computed:
            del self._held[sequence]
            held.idle, held.tokens = True, keep
        else:
            self._forget(held)
        return held.slot

    def _place(self, held: _HeldSlot, position: int) -> int:
        """The last place up to `position` where the layers can go on."""
        places = (position, min(position, held.computed), held.snapshot if held.snapshot <= position else 0)
        return next((place for place in places if self._reaches(held, place)), 0)

    def _reaches(self, held: _HeldSlot, place: int) -> bool:
        if place in (0, held.computed):
            return True
        if place > held.computed or self._reach is None:
            return False
        return self._reach.allows(place, held.furthest, (held.snapshot,))

    def _forget(self, held: _HeldSlot) -> None:
        if self._held.get(held.sequence) is held:
            del self._held[held.sequence]
        if self._by_slot.get(held.slot) is held:
            del self._by_slot[held.slot]
