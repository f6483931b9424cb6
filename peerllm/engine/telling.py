"""What the compute thread tells the daemon: at once, or once the pass is over that it is about to begin (ADR 15).

A token that has come back begins the next pass of its sequence. Telling of it first wakes the loop and the daemon,
which then compete with the pass for the processor and the interpreter's lock; told after the pass, they work while this
device waits for the others. It shows the token later by one pass, so only short ones are waited for.
"""

from __future__ import annotations

from collections.abc import Callable

from peerllm.engine.messages import FromEngine

SHORT_MS = 50.0  # a pass; nobody sees a token come later by less


class Telling:
    """Calls `tell` in the order in which it is called itself. What is told later is kept until `flush`."""

    def __init__(self, tell: Callable[[FromEngine], None]) -> None:
        self._tell = tell
        self._kept: list[FromEngine] = []

    def __call__(self, message: FromEngine) -> None:
        """At once, behind what was kept."""
        if self._kept:
            self.flush()
        self._tell(message)

    def __len__(self) -> int:
        """How much is kept."""
        return len(self._kept)

    def later(self, message: FromEngine) -> None:
        """After the next pass."""
        self._kept.append(message)

    def flush(self, most: int | None = None) -> None:
        """Tell what is kept, of that the first `most` (None: all)."""
        due = self._kept[:most]
        del self._kept[:most]
        for message in due:
            self._tell(message)
