"""Whose prompt is fed next: clients take turns, and the prompts of each client among themselves. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class PromptTurns:
    """Sequences with prompt tokens still to feed."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[int]] = {}  # by client; the next one first, in both

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, client: str, sequence: int) -> None:
        self._waiting.setdefault(client, deque()).append(sequence)

    def next(self, able: Callable[[int], bool]) -> int | None:
        """The first sequence in turn that is `able`; one that is not keeps its turn."""
        return next((sequence for own in self._waiting.values() for sequence in own if able(sequence)), None)

    def served(self, client: str, sequence: int, *, more: bool) -> None:
        """A sequence had its turn: its client goes last, and among the client's the sequence, if it has `more`."""
        self.remove(client, sequence)
        own = self._waiting.pop(client, deque())
        if more:
            own.append(sequence)
        if own:
            self._waiting[client] = own

    def remove(self, client: str, sequence: int) -> None:
        """Nothing more is to be fed of a sequence. Unknown sequences are ignored."""
        own = self._waiting.get(client, deque())
        if sequence in own:
            own.remove(sequence)
            if not own:
                del self._waiting[client]
