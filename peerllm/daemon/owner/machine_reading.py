"""Reads what owners set limits for: the time of day, battery, temperature, free memory. Blocking, but quick."""

from __future__ import annotations

import time

import psutil

from peerllm.daemon.decide.owner_limits import MachineRead, OwnerLimits

# Sensors that say nothing of what computing heats.
ELSEWHERE = ("nvme", "drivetemp", "iwlwifi", "ath", "mt79", "r8169", "jc42", "spd5118", "battery", "bat")
LEAST_CELSIUS, MOST_CELSIUS = 1.0, 130.0  # a sensor that says more or less is broken


def read_machine(limits: OwnerLimits, memory: bool = True) -> MachineRead:
    """Read the free memory and what there are limits for."""
    now = time.localtime()
    return MachineRead(
        minute=now.tm_hour * 60 + now.tm_min,
        battery_percent=None if limits.battery_percent is None else battery_percent(),
        celsius=None if limits.hot_celsius is None else hottest_celsius(),
        available_bytes=int(psutil.virtual_memory().available) if memory else None,
    )


def battery_percent() -> float | None:
    """The charge of the battery that the machine runs on; None on mains power, or without a battery."""
    sensors = getattr(psutil, "sensors_battery", None)
    try:
        battery = sensors() if sensors is not None else None
    except (OSError, ValueError, RuntimeError):  # a driver that does not answer
        return None
    if battery is None or battery.power_plugged is not False:
        return None
    return float(battery.percent)


def hottest_celsius() -> float | None:
    """The highest temperature of processor and board; None where no sensor gives a plausible one."""
    sensors = getattr(psutil, "sensors_temperatures", None)
    try:
        found = sensors() if sensors is not None else {}
    except (OSError, ValueError, RuntimeError):
        return None
    readings = [
        float(one.current)
        for chip, entries in found.items()
        if not chip.lower().startswith(ELSEWHERE)
        for one in entries
        if one.current is not None and LEAST_CELSIUS <= one.current <= MOST_CELSIUS
    ]
    return max(readings, default=None)
