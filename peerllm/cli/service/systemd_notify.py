"""systemd's notify protocol (sd_notify(3), sd_watchdog_enabled(3)); silent where nobody asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

FEEDS = 3  # in each of the watchdog's periods, so that a late one is none too many


def notify(state: str) -> None:
    """Tell the service manager "READY=1", "STOPPING=1", ..."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line, contextlib.suppress(OSError):
        line.setblocking(False)  # a manager that does not read must not stop the loop
        line.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def watchdog_s() -> float | None:
    """How often the service manager wants to hear of this process at least; None if it does not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None


@contextlib.asynccontextmanager
async def watchdog_fed() -> AsyncIterator[None]:
    """While the block runs, the event loop tells that it is not stuck."""
    period_s = watchdog_s()
    if period_s is None:
        yield
        return

    async def feed() -> None:
        while True:
            notify("WATCHDOG=1")
            await asyncio.sleep(period_s / FEEDS)

    feeding = asyncio.create_task(feed(), name="feed the watchdog")
    try:
        yield
    finally:
        feeding.cancel()
        await asyncio.wait({feeding})
