"""Where a JSON object ends in a text that arrives in pieces."""

from __future__ import annotations

import re

_STEP = re.compile(r'["\\{}\[\]]')


class JsonEnd:
    """Counts brackets outside of strings; whether it is JSON in between is not looked at."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth  # brackets that are open already
        self._quoted = False
        self._escaped = False  # a backslash was the last character

    def find(self, text: str) -> int | None:
        """The place behind the last bracket; None: not in this piece."""
        begin = 1 if self._escaped and text else 0
        self._escaped = self._escaped and not text
        for found in _STEP.finditer(text):
            at, sign = found.start(), found[0]
            if at < begin:
                continue
            if sign == "\\":
                begin = at + 2
                self._escaped = begin > len(text)
            elif sign == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if sign in "{[" else -1
                if self._depth <= 0:
                    return at + 1
        return None
