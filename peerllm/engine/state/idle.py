"""What ended sequences left in their slots, as the source knows it, and which slot a new one gets. Pure.

A slot is taken up again only for the client whose sequence it held: how fast an answer begins would tell another
client what somebody else had asked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from peerllm.engine.base import Reach


@dataclass(frozen=True, slots=True)
class Remains:
    """Of the sequence that held a slot last."""

    sequence: int
    client: str
    ids: tuple[int, ...]  # computed at every stage
    furthest: int  # tokens that a stage may have held at most since the slot began afresh, these and later ones


@dataclass(frozen=True, slots=True)
class SlotChoice:
    """A slot for a new sequence, which begins at `position` of its prompt."""

    slot: int
    position: int = 0
    furthest: int = 0  # as in Remains


class IdleSlots:
    """At most one Remains per slot, that is `slots` x context ids. `reach` None: nothing is ever taken up again."""

    def __init__(self, slots: int, reach: Reach | None) -> None:
        self._slots, self._reach = slots, reach
        self._remains: dict[int, Remains] = {}  # by slot; first the one that ended longest ago

    def keep(self, slot: int, remains: Remains) -> None:
        """A sequence ended well and has left this in its slot, if any use can be made of it."""
        if self._reach is not None and remains.ids and self._reach.allows(len(remains.ids), remains.furthest):
            self._remains[slot] = remains

    def kept(self, slot: int) -> int:
        """Tokens that an idle slot is kept for."""
        remains = self._remains.get(slot)
        return 0 if remains is None else len(remains.ids)

    def forget(self, sequence: int) -> None:
        """A stage has let go of what this sequence left."""
        self._remains = {slot: remains for slot, remains in self._remains.items() if remains.sequence != sequence}

    def clear(self) -> None:
        self._remains.clear()

    def take(self, running: Collection[int], prompt: Sequence[int], client: str) -> SlotChoice | None:
        """A slot not `running`, idle no more: what it held up to the position stays, the rest is lost.

        The one that spares most of the prompt, unless it holds much else and so is another conversation with the same
        beginning; else an empty one, lowest first; else the one that ended longest ago. None: all are running.
        """
        spared = {slot: self._spares(remains, prompt, client) for slot, remains in self._remains.items()}
        fit = [slot for slot, tokens in spared.items() if _continues(tokens, len(prompt), self.kept(slot))]
        empty = (slot for slot in range(self._slots) if slot not in running and slot not in self._remains)
        oldest = next(iter(self._remains), None)
        slot = max(fit, key=spared.__getitem__) if fit else next(empty, oldest)
        if slot is None:
            return None
        remains = self._remains.pop(slot, None)
        position = spared.get(slot, 0)
        return SlotChoice(slot, position, remains.furthest if remains is not None and position else 0)

    def _spares(self, remains: Remains, prompt: Sequence[int], client: str) -> int:
        """Tokens of a prompt that need not be computed, the last of which always must."""
        if client != remains.client or self._reach is None:
            return 0
        position = min(_common(remains.ids, tuple(prompt)), len(prompt) - 1)
        return position if self._reach.allows(position, remains.furthest) else 0


def _continues(spared: int, prompt: int, held: int) -> bool:
    """Whether a prompt goes on with (or repeats) what a slot holds, and does not only begin alike."""
    return spared > 0 and (2 * spared >= held or spared == prompt - 1)


def _common(some: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    most = min(len(some), len(others))
    if some[:most] == others[:most]:
        return most
    return next(place for place in range(most) if some[place] != others[place])
