"""What a family reads from config.json: foreign values, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from typing import Any

from peerllm.engine.graph.table.family import COMMON, Family

MOST_SHOWN = 100  # characters of a value or a reason in a message
MAX_SIZE = 1 << 24  # of any count in a configuration, since lists and tables get that long


class UnfitError(Exception):
    """The graph engine does not compute this model; the message says why."""


class ConfigValues:
    """The values that a family reads from config.json, by our names; transformers' defaults for missing ones."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self._config, self._keys, self._known = config, family.keys, family.values
        self._defaults = {**COMMON, **family.defaults}

    def including(self, known: Mapping[str, Any]) -> ConfigValues:
        """These values, but for those that are known to be others."""
        made = copy(self)
        made._known = {**self._known, **known}
        return made

    def get(self, name: str, default: Any = None) -> Any:
        """The value called `name`; `default` if it is null or the family does not read it."""
        if name in self._known:
            value = self._known[name]
            return default if value is None else value
        key = self._keys.get(name, name)
        value = self._config[key] if name in self._defaults and key in self._config else self._defaults.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None) -> int:
        """The value as a whole number above zero; UnfitError if it is none."""
        value = self.get(name, default)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise UnfitError(f"config.json's {name} is {str(value)[:MOST_SHOWN]}")
        return value

    def number(self, name: str, default: float) -> float:
        """The value as a finite number; UnfitError if it is none."""
        value = float(self.get(name, default))
        if not math.isfinite(value):
            raise UnfitError(f"config.json's {name} is {value}")
        return value
