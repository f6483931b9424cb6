"""The prefixes that ended sequences left in idle slots, as the source knows them, and which slot a new one gets. Pure.

Only the client whose sequence a slot held may begin with what is left there: to any other client, an answer that
begins sooner would tell what somebody else had asked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from peerllm.engine.base import Reach


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What the last sequence of a slot left in it."""

    sequence: int
    client: str
    ids: tuple[int, ...]  # computed at every stage
    furthest: int  # the most tokens, these and later ones, that a stage may have held since the slot began afresh


@dataclass(frozen=True, slots=True)
class SlotChoice:
    """A slot for a new sequence, which begins at `position` of its prompt."""

    slot: int
    position: int = 0
    furthest: int = 0  # see CachedPrefix


class PrefixCache:
    """At most one CachedPrefix per slot, that is `slots` × context ids. Without `reach` nothing is ever kept."""

    def __init__(self, slots: int, reach: Reach | None) -> None:
        self._slots, self._reach = slots, reach
        self._remains: dict[int, CachedPrefix] = {}  # by slot; first the one that ended longest ago

    def keep(self, slot: int, remains: CachedPrefix) -> None:
        """Remember what a sequence that ended well left in its slot, if a later one can begin with it."""
        if self._reach is not None and remains.ids and self._reach.allows(len(remains.ids), remains.furthest):
            self._remains[slot] = remains

    def kept(self, slot: int) -> int:
        """How many tokens the stages are to keep in an idle slot."""
        remains = self._remains.get(slot)
        return 0 if remains is None else len(remains.ids)

    def forget(self, sequence: int) -> None:
        """Forget what a sequence left: some stage has let go of it."""
        self._remains = {slot: remains for slot, remains in self._remains.items() if remains.sequence != sequence}

    def clear(self) -> None:
        self._remains.clear()

    def take(self, running: Collection[int], prompt: Sequence[int], client: str) -> SlotChoice | None:
        """A slot that is not `running`; it is idle no more. None: all are running.

        Preferred is the idle slot that spares most of the prompt, unless it holds much else, as that of another
        conversation with the same beginning does. Then the lowest empty slot, then the slot that ended longest ago.
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

    def _spares(self, remains: CachedPrefix, prompt: Sequence[int], client: str) -> int:
        """How many tokens of a prompt need not be computed; its last one always must be."""
        if client != remains.client or self._reach is None:
            return 0
        position = min(_common(remains.ids, tuple(prompt)), len(prompt) - 1)
        return position if self._reach.allows(position, remains.furthest) else 0


def _continues(spared: int, prompt: int, held: int) -> bool:
    """Whether a prompt continues or repeats what a slot holds, instead of only beginning alike."""
    return spared > 0 and (2 * spared >= held or spared == prompt - 1)


def _common(some: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    most = min(len(some), len(others))
    if some[:most] == others[:most]:
        return most
    return next(place for place in range(most) if some[place] != others[place])
