"""The queue for slots, fair between clients. Sans-I/O.

Within a client: first come, first served. Between clients: a free slot goes to the client that holds the fewest slots,
among equals to the one that has waited longest for its turn. A client may queue at most as many sequences as there are
places left for all others, so that the next client to come always finds a place.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Mapping

from peerllm.errors import OverloadedError

MAX_QUEUED = 512  # sequences waiting for a slot, over all clients of a deployment; half of them of one client


class FairQueue:
    """Sequence numbers, grouped by client."""

    def __init__(self, limit: int = MAX_QUEUED) -> None:
        self._limit = limit
        self._waiting: OrderedDict[str, deque[int]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(line) for line in self._waiting.values())

    def add(self, sequence: int, client: str, retry_after_s: float = 5.0) -> None:
        """Queue a sequence. OverloadedError, with the time to ask again, if the queue or the client's share is full."""
        own, room = len(self._waiting.get(client, ())), self._limit - len(self)
        if own >= room:
            line = f"{own} answers of yours" if room else f"{self._limit} answers"
            text = f"{line} are waiting already; ask again in {retry_after_s:.0f} s"
            raise OverloadedError(text, retry_after_s)
        self._waiting.setdefault(client, deque()).append(sequence)

    def next(self, held: Mapping[str, int]) -> int | None:
        """Take the sequence whose turn it is; `held` says how many slots each client has."""
        if not self._waiting:
            return None
        client = min(self._waiting, key=lambda client: held.get(client, 0))  # of equals the first
        line = self._waiting[client]
        sequence = line.popleft()
        if line:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return sequence

    def remove(self, sequence: int) -> None:
        """Take a sequence out of the queue; unknown numbers are ignored."""
        for client, line in self._waiting.items():
            if sequence in line:
                line.remove(sequence)
                if not line:
                    del self._waiting[client]
                return

    def order(self, held: Mapping[str, int]) -> list[int]:
        """Every sequence in the order in which slots would be given if none were given back."""
        lines = [deque(line) for line in self._waiting.values()]
        turns = [(held.get(client, 0), place, place) for place, client in enumerate(self._waiting)]
        heapq.heapify(turns)
        result: list[int] = []
        while turns:
            held_now, _, place = heapq.heappop(turns)
            result.append(lines[place].popleft())
            if lines[place]:
                heapq.heappush(turns, (held_now + 1, len(lines) + len(result), place))
        return result
