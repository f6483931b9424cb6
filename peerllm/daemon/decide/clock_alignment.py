"""Another device's clock beside this one's, from questions and answers (as NTP does). Pure.

The other device read its clock at some moment between the question and the answer. Taking the middle of that time errs
by at most half of it; so of several readings the one with the shortest round trip is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reading:
    """What the other clock showed (`there_ns`) between two moments of this one."""

    sent_ns: int
    there_ns: int
    came_ns: int

    @property
    def here_ns(self) -> int:
        """This clock's time at which the other was read, to within `error_ns`: the middle of the round trip."""
        return (self.sent_ns + self.came_ns) // 2

    @property
    def error_ns(self) -> int:
        return (self.came_ns - self.sent_ns + 1) // 2

    @property
    def offset_ns(self) -> int:
        """How far the other clock is ahead."""
        return self.there_ns - self.here_ns


def quickest(readings: Sequence[Reading]) -> Reading:
    """The reading with the shortest round trip; `readings` must not be empty."""
    return min(readings, key=lambda reading: reading.error_ns)


@dataclass(frozen=True, slots=True)
class Alignment:
    """Maps the other clock's times to this one's, by a reading before and one after; clocks may drift."""

    before: Reading
    after: Reading

    @property
    def error_ns(self) -> int:
        """The most that `here` errs by between the readings, if both clocks run evenly."""
        return max(self.before.error_ns, self.after.error_ns)

    @property
    def drift(self) -> float:
        """Seconds that the other clock gains per second, including the readings' own error."""
        here, there = self._passed()
        return there / here - 1 if here > 0 and there > 0 else 0.0

    def here(self, there_ns: int) -> int:
        """This clock's time at that time of the other clock; rises with it."""
        first, (here, there) = self.before, self._passed()
        since = there_ns - first.there_ns
        # Whole numbers: moments of the same clock keep their order, spans within spans stay there.
        return first.here_ns + (since * here // there if here > 0 and there > 0 else since)

    def _passed(self) -> tuple[int, int]:
        return self.after.here_ns - self.before.here_ns, self.after.there_ns - self.before.there_ns
