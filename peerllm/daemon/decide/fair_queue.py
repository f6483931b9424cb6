"""The queue for slots, fair between those who ask and between their clients. Sans-I/O.

Who asks is known: another device, or an address. Its clients are names that it tells, and may make up. Within a client:
first come, first served. A free slot goes to who asks for and holds the fewest slots, of its clients to the one that
holds the fewest, and among equals to the one that has waited longest for its turn. Each may queue so many sequences
that the next one to come always finds a place.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping

from peerllm.errors import OverloadedError

MAX_QUEUED = 512  # sequences waiting for a slot, over all clients of a deployment; half of them of one client


def asker_of(client: str) -> str:
    """The device or address that asks for a client (api/peers/caller.py): the part that no client can choose."""
    return client.partition("/")[0]


class FairQueue:
    """Sequence numbers, grouped by client, and clients by who asks for them."""

    def __init__(self, limit: int = MAX_QUEUED) -> None:
        self._limit = limit
        self._waiting: OrderedDict[str, OrderedDict[str, deque[int]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(_count, self._waiting.values()))

    def add(self, sequence: int, client: str, retry_after_s: float = 5.0) -> None:
        """Queue a sequence. OverloadedError, with the time to ask again, if the queue or the client's share is full."""
        lines: Mapping[str, deque[int]] = self._waiting.get(asker_of(client), {})
        own, room = len(lines.get(client, ())), self._limit - len(self)
        if own >= room or _count(lines) >= 2 * room:
            line = f"{max(own, _count(lines))} answers of yours" if room else f"{self._limit} answers"
            text = f"{line} are waiting already; ask again in {retry_after_s:.0f} s"
            raise OverloadedError(text, retry_after_s)
        self._waiting.setdefault(asker_of(client), OrderedDict()).setdefault(client, deque()).append(sequence)

    def next(self, held: Mapping[str, int]) -> int | None:
        """Take the sequence whose turn it is; `held` says how many slots each client has."""
        if not self._waiting:
            return None
        slots = _by_asker(held)
        asker = min(self._waiting, key=lambda asker: slots[asker])  # of equals the first
        lines = self._waiting[asker]
        client = min(lines, key=lambda client: held.get(client, 0))
        sequence = lines[client].popleft()
        lines.move_to_end(client)
        self._waiting.move_to_end(asker)
        self._tidy(asker, client)
        return sequence

    def remove(self, sequence: int) -> None:
        """Take a sequence out of the queue; unknown numbers are ignored."""
        for asker, lines in self._waiting.items():
            for client, line in lines.items():
                if sequence in line:
                    line.remove(sequence)
                    self._tidy(asker, client)
                    return

    def order(self, held: Mapping[str, int]) -> list[int]:
        """Every sequence in the order in which slots would be given if none were given back."""
        slots, result = _by_asker(held), list[int]()
        turns = [
            (
                slots[asker],
                place,
                [(held.get(client, 0), n, deque(line)) for n, (client, line) in enumerate(lines.items())],
            )
            for place, (asker, lines) in enumerate(self._waiting.items())
        ]  # both heaps: places are unique, so that nothing behind them is compared
        for _, _, clients in turns:
            heapq.heapify(clients)
        heapq.heapify(turns)
        while turns:
            slots_now, _, clients = heapq.heappop(turns)
            held_now, _, line = heapq.heappop(clients)
            result.append(line.popleft())
            behind = self._limit + len(result)  # all places so far
            if line:
                heapq.heappush(clients, (held_now + 1, behind, line))
            if clients:
                heapq.heappush(turns, (slots_now + 1, behind, clients))
        return result

    def _tidy(self, asker: str, client: str) -> None:
        lines = self._waiting[asker]
        if not lines[client]:
            del lines[client]
        if not lines:
            del self._waiting[asker]


def _count(lines: Mapping[str, deque[int]]) -> int:
    return sum(map(len, lines.values()))


def _by_asker(held: Mapping[str, int]) -> Counter[str]:
    slots: Counter[str] = Counter()
    for client, count in held.items():
        slots[asker_of(client)] += count
    return slots
