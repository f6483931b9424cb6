"""Who waits for a slot, and who is next: first come first served within a client, the clients in turn. Sans-I/O."""

from __future__ import annotations

from collections import OrderedDict, deque

from peerllm.errors import OverloadedError

MAX_QUEUED = 256  # sequences waiting for a slot, over all clients of a deployment


class FairQueue:
    """Sequence numbers, grouped by client."""

    def __init__(self, limit: int = MAX_QUEUED) -> None:
        self._limit = limit
        self._waiting: OrderedDict[str, deque[int]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(line) for line in self._waiting.values())

    def add(self, sequence: int, client: str, retry_after_s: float = 5.0) -> None:
        """OverloadedError when the queue is full; it says when to ask again."""
        if len(self) >= self._limit:
            text = f"{self._limit} answers are waiting already; ask again in {retry_after_s:.0f} s"
            raise OverloadedError(text, retry_after_s)
        self._waiting.setdefault(client, deque()).append(sequence)

    def next(self) -> int | None:
        """Take the sequence whose turn it is; its client goes to the end of the round."""
        if not self._waiting:
            return None
        client, line = next(iter(self._waiting.items()))
        sequence = line.popleft()
        if line:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return sequence

    def remove(self, sequence: int) -> None:
        """Who waits no more leaves the line; unknown numbers are no matter."""
        for client, line in self._waiting.items():
            if sequence in line:
                line.remove(sequence)
                if not line:
                    del self._waiting[client]
                return

    def order(self) -> list[int]:
        """Every sequence in the order in which slots will be given."""
        lines = [deque(line) for line in self._waiting.values()]
        result: list[int] = []
        while lines:
            result += [line.popleft() for line in lines]
            lines = [line for line in lines if line]
        return result
