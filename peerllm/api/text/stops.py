"""Stop strings in a text that arrives in pieces of any size."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Lets text through up to the stop string that ends first; holds back what may yet become one.

    What comes out does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is not empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found = ""  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        return bool(self.found)

    def push(self, text: str) -> str:
        """The text that is certain now; "" once stopped."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            self._held = ""
            return text[:at]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The rest: no more text comes, so nothing can become a stop string."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
