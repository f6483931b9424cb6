"""What the compute thread tells the daemon: at once, or once the pass is over that it is about to begin.

A token that has come back begins the next pass of its sequence. Telling of it first wakes the loop and the daemon,
which then compete with the pass for the processor and the interpreter's lock; told after the pass, they work while this
device waits for the others. It shows the token later by one pass of this stage, so only while these are short.
"""

from __future__ import annotations

from collections.abc import Callable

from peerllm.engine.messages import FromEngine

SHORT_S = 0.05  # nobody sees a token come later by less


class Telling:
    """Calls `tell` in the order in which it is called itself."""

    def __init__(self, tell: Callable[[FromEngine], None]) -> None:
        self._tell = tell
        self._kept: list[FromEngine] = []
        self._short = False  # the last pass was

    def __call__(self, message: FromEngine) -> None:
        """At once, behind what was kept."""
        if self._kept:
            self.flush()
        self._tell(message)

    def later(self, message: FromEngine) -> None:
        """After the next pass, or before the thread waits."""
        if self._short:
            self._kept.append(message)
        else:
            self._tell(message)

    def computed(self, seconds: float) -> None:
        """A pass is over, which took so long."""
        self._short = seconds < SHORT_S
        self.flush()

    def flush(self) -> None:
        """Nothing is kept any longer."""
        kept, self._kept = self._kept, []
        for message in kept:
            self._tell(message)
