"""The owner's limits on disk. What was said last counts: an option of `peerllm up`, or `peerllm limits` since."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peerllm.daemon.decide.owner_limits import DAY_MINUTES, OwnerLimits
from peerllm.errors import BadInputError
from peerllm.saved_files import replace_file

LIMITS_FILE = "limits.json"
MAX_BYTES = 1 << 50  # of memory
MAX_THREADS = 4096
MAX_CELSIUS = 150.0
_WORDS = {
    "memory_bytes": f"bytes, at most {MAX_BYTES}; 0 for what is free",
    "threads": f"a number of processors, at most {MAX_THREADS}; 0 for all",
    "hours": f"two different minutes of the day, from 0 to {DAY_MINUTES}",
    "battery_percent": "a percentage from 0 to 100; 0 for none",
    "hot_celsius": f"degrees Celsius, at most {MAX_CELSIUS:g}; 0 for none",
    "paused": "true or false",
}

log = logging.getLogger(__name__)


def changed(limits: OwnerLimits, changes: Mapping[str, Any]) -> OwnerLimits:
    """The limits with some of them set anew; 0, or all day, takes one back. BadInputError names what is no limit."""
    values: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in _WORDS:
            raise BadInputError(f"{name[:40]!r} is no limit; there are {', '.join(_WORDS)}")
        if not _fits(name, value):
            raise BadInputError(f"{name} must be {_WORDS[name]}")
        if name == "hours" and value is not None:
            value = None if tuple(value) == (0, DAY_MINUTES) else tuple(value)
        values[name] = (value or None) if name not in ("paused", "hours") else value
    return replace(limits, **values)


def _fits(name: str, value: Any) -> bool:
    match name:
        case "paused":
            return isinstance(value, bool)
        case "hours":
            if value is None:
                return True
            pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(one) is int for one in value)
            return pair and min(value) >= 0 and max(value) <= DAY_MINUTES and value[0] != value[1]
        case _ if value is None:
            return True
        case _ if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            return False
        case "hot_celsius":
            return value <= MAX_CELSIUS
        case "battery_percent":
            return isinstance(value, int) and value <= 100
        case _:
            return isinstance(value, int) and value <= {"memory_bytes": MAX_BYTES}.get(name, MAX_THREADS)


def recalled(data_dir: Path, given: Mapping[str, Any]) -> OwnerLimits:
    """The limits for this start. `given` are those among the options of `peerllm up`: one that differs from the start
    before was said last, so it counts."""
    stored = _read(data_dir / LIMITS_FILE)
    limits, before = OwnerLimits(), stored.get("started_with")
    before = before if isinstance(before, dict) else {}
    try:
        limits = changed(limits, stored.get("limits") or {})
    except (BadInputError, AttributeError) as error:
        log.warning("%s is not taken: %s", data_dir / LIMITS_FILE, error)
    default = asdict(OwnerLimits())
    news = {name: value for name, value in given.items() if _plain(value) != before.get(name)}
    limits = replace(limits, **{name: default[name] for name, value in news.items() if value is None})
    limits = changed(limits, {name: value for name, value in news.items() if value is not None})
    keep(data_dir, limits, given)
    return limits


def keep(data_dir: Path, limits: OwnerLimits, given: Mapping[str, Any]) -> None:
    """Remember them for the next start. OSError where the disk is full: they hold until then all the same."""
    file = data_dir / LIMITS_FILE
    data = json.dumps({"limits": asdict(limits), "started_with": dict(given)}, indent=1).encode()
    if not file.exists() or file.read_bytes() != data:
        replace_file(file, data)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s is not taken: %s", file, error)
        return {}
    return value if isinstance(value, dict) else {}
