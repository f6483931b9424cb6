"""How much one device may send to this one and keep it busy with: a token bucket, filled with time. Sans-I/O."""

from __future__ import annotations

BYTES_PER_S = 4 << 20  # what one device may send in the long run
MESSAGE_BYTES = 4 << 10  # what a message counts for besides its own: so many small ones cost time, not room
BUSY_SHARE = 0.1  # of this device's time that handling the messages of one other may take in the long run
BURST_S = 8.0  # of unused allowance that is kept: 32 MB at once, or 0.8 s of work


class TrafficBudget:
    """One device's, over all its links; `now` is any clock that only rises."""

    def __init__(self, now: float) -> None:
        self._full_at = now  # when nothing that was spent will count any more

    def spend(self, nbytes: int, busy_s: float, now: float) -> None:
        """A message of so many bytes came, and kept this device busy for so long."""
        cost_s = (nbytes + MESSAGE_BYTES) / BYTES_PER_S + busy_s / BUSY_SHARE
        self._full_at = max(self._full_at, now) + cost_s

    def wait_s(self, now: float) -> float:
        """How long nothing more may be read; 0 while there is allowance left."""
        return max(0.0, self._full_at - now - BURST_S)
