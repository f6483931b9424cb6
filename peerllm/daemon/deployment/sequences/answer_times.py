"""How long the last answers of a deployment took, and so how long the next will have to wait."""

from __future__ import annotations

from collections import deque
from statistics import fmean

MEASURED_ANSWERS = 16  # the last answers that figures are the mean of
RETRY_UNKNOWN_S, RETRY_LEAST_S, RETRY_MOST_S = 5.0, 1.0, 60.0  # what one who finds the queue full is told


class AnswerTimes:
    """`note` each answer that is complete."""

    def __init__(self) -> None:
        self._first_ms: deque[float] = deque(maxlen=MEASURED_ANSWERS)
        self._step_ms: deque[float] = deque(maxlen=MEASURED_ANSWERS)  # 0: an answer of one token has none
        self._held_s: deque[float] = deque(maxlen=MEASURED_ANSWERS)

    def note(self, submitted: float, first: float, ended: float, tokens: int) -> None:
        """When (in seconds) it was given a slot, its first token came and its last; how many came."""
        self._first_ms.append(1000 * (first - submitted))
        self._step_ms.append(1000 * (ended - first) / (tokens - 1) if tokens > 1 else 0.0)
        self._held_s.append(ended - submitted)

    @property
    def means(self) -> dict[str, float]:
        """As `status` shows them; empty before the first answer."""
        if not self._first_ms:
            return {}
        result = {"time_to_first_token_ms": fmean(self._first_ms)}
        steps = [step for step in self._step_ms if step > 0]
        if steps:
            result |= {"step_ms": fmean(steps), "tokens_per_second": 1000 / fmean(steps)}
        return result

    def retry_after_s(self, waiting: int, slots: int) -> float:
        """Seconds until so many have slots, if answers take as long as they did of late; bounded."""
        if not self._held_s or not slots:
            return RETRY_UNKNOWN_S
        return min(max(waiting * fmean(self._held_s) / slots, RETRY_LEAST_S), RETRY_MOST_S)
