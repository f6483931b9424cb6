"""A stand-in for any part of a daemon."""

from __future__ import annotations

from typing import Any


class Noting:
    """Whatever is called on it is noted in `calls`, with its name and arguments, but for the `known` attributes."""

    def __init__(self, name: str, calls: list[tuple[object, ...]], **known: object) -> None:
        self._name, self._calls, self._known = name, calls, known

    def __getattr__(self, what: str) -> Any:
        if what in self._known:
            return self._known[what]
        return lambda *args, **options: self._calls.append((f"{self._name}.{what}", *args, *options.items()))
