"""Whether this device is to spend power on being quicker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from time import monotonic

import psutil

from peerllm.types import KeepWarm

LOOK_S = 30.0  # between two looks at the battery


def warm(choice: KeepWarm, clock: Callable[[], float] = monotonic) -> Callable[[], bool]:
    """Whether to keep warm now; "auto": not while it runs on a battery."""
    if choice != "auto":
        return lambda: choice == "always"
    looked, mains = -LOOK_S, True

    def now() -> bool:
        nonlocal looked, mains
        if clock() - looked >= LOOK_S:
            looked, mains = clock(), on_mains()
        return mains

    return now


def on_mains() -> bool:
    """Also where nothing is known of a battery."""
    battery = None
    with suppress(Exception):  # what systems say of batteries takes many forms
        battery = psutil.sensors_battery()
    return battery is None or battery.power_plugged is not False
