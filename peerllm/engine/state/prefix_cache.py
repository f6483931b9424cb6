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
    ids: tuple[int, ...]  # computed at every stage; those that were lost meanwhile are found out when it is taken up
    furthest: int  # the most tokens, these and later ones, that a stage may have held since the slot began afresh
    settled: bool = True  # no stage has computed a token beyond `ids`
    snapshot: int = 0  # the position of which every stage keeps a snapshot; 0: none
    body: int = 0  # tokens of the prompt, without the last ones, which templates often render anew

    @property
    def known(self) -> tuple[int, ...]:
        """The positions for which every stage has the states of its recurrent layers."""
        return (self.snapshot, len(self.ids)) if self.settled else (self.snapshot,)


@dataclass(frozen=True, slots=True)
class SlotChoice:
    """A slot for a new sequence, which begins at `position` of its prompt."""

    slot: int
    position: int = 0
    furthest: int = 0  # see CachedPrefix
    snapshot: int = 0  # the position of which the slot keeps a snapshot; 0: none
    after: int = 0  # the ended sequence that left the first `position` tokens
    parting: int = 0  # where the prompt parts from an earlier one inside of that one's body: others may part there too


class PrefixCache:
    """At most one CachedPrefix per slot, that is `slots` × context ids. Without `reach` nothing is ever kept."""

    def __init__(self, slots: int, reach: Reach | None) -> None:
        self._slots, self._reach = slots, reach
        self._remains: dict[int, CachedPrefix] = {}  # by slot; first the one that ended longest ago

    def keep(self, slot: int, remains: CachedPrefix) -> None:
        """Remember what a sequence that ended well left in its slot, if a later one can begin with it."""
        if self._start(remains, len(remains.ids)):
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

        Preferred is the idle slot that spares most of the prompt, if the prompt continues or repeats at least half of
        what the slot holds, instead of only beginning alike as another conversation does. Then the lowest empty slot,
        then the slot that ended longest ago.
        """
        spared, fit, parting = dict[int, int](), list[int](), 0
        for idle, remains in self._remains.items():
            common = _common(remains.ids, tuple(prompt)) if client == remains.client else 0
            if common < remains.body:
                parting = max(parting, common)
            spared[idle] = self._start(remains, min(common, len(prompt) - 1))  # the last token must be computed
            if spared[idle] and (2 * common >= len(remains.ids) or common >= len(prompt) - 1):
                fit.append(idle)
        empty = (slot for slot in range(self._slots) if slot not in running and slot not in self._remains)
        oldest = next(iter(self._remains), None)
        slot = max(fit, key=spared.__getitem__) if fit else next(empty, oldest)
        if slot is None:
            return None
        left, position = self._remains.pop(slot, None), spared.get(slot, 0)
        if left is None or not position:
            return SlotChoice(slot, parting=parting)
        return SlotChoice(slot, position, left.furthest, left.snapshot, left.sequence, parting)

    def _start(self, remains: CachedPrefix, most: int) -> int:
        """The last position up to `most` where a sequence can take the slot up; 0: nowhere but afresh."""
        reach = self._reach
        if reach is None:
            return 0
        places = [most] if reach.rewinds else [place for place in remains.known if place <= most]
        return max((place for place in places if reach.allows(place, remains.furthest, remains.known)), default=0)


def _common(some: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Length of the common prefix."""
    most = min(len(some), len(others))
    if some[:most] == others[:most]:
        return most
    return next(place for place in range(most) if some[place] != others[place])
