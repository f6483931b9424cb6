"""Whether this device is to spend power on being quicker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import psutil

LOOK_S = 30.0  # between two looks at the battery


async def watch(tell: Callable[[bool], None]) -> None:
    """Until cancelled: whether it runs on mains, now and from time to time."""
    while True:
        tell(await asyncio.to_thread(on_mains))
        await asyncio.sleep(LOOK_S)


def on_mains() -> bool:
    """Also where nothing is known of a battery. May take long."""
    battery = None
    with suppress(Exception):  # what systems say of batteries takes many forms
        battery = psutil.sensors_battery()
    return battery is None or battery.power_plugged is not False
