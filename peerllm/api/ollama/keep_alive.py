"""How long a model is to stay loaded, in all the ways that Ollama's clients say it."""

from __future__ import annotations

import re
from typing import Annotated

from msgspec import Meta

from peerllm.api.core.generation import MAX_KEEP_S
from peerllm.api.error_answers import FieldError

FOR_GOOD_S = -1.0
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(rf"[-+]?(?:{_PART})+")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?")
MAX_CHARS = 64
_WRITTEN = Meta(extra_json_schema={"pattern": f"^({_NUMBER.pattern}|{_DURATION.pattern})?$", "maxLength": MAX_CHARS})
KeepAlive = int | float | Annotated[str, _WRITTEN] | None


def seconds_of(given: KeepAlive) -> float | None:
    """300, "300", "5m" and "1h30m" are durations; below 0 is for good; None and "" leave it to the device."""
    if given is None or given == "":
        return None
    if isinstance(given, str):
        text = given.strip()
        if len(text) > MAX_CHARS or not (_NUMBER.fullmatch(text) or _DURATION.fullmatch(text)):
            raise FieldError('keep_alive must be a number of seconds or a duration such as "5m"', "keep_alive")
        if text.startswith("-"):
            return FOR_GOOD_S
        parts = re.findall(_PART, text) or [(text, "s")]
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    else:
        seconds = given
    return float(seconds) if 0 <= seconds < MAX_KEEP_S else FOR_GOOD_S
