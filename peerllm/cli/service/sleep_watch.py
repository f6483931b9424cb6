"""Before the machine sleeps, and after: logind's PrepareForSleep with a delay inhibitor, where there is a system bus.

logind waits with sleeping until every delay inhibitor is closed, for 5 s where nothing else is configured.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

LOGIND, PATH, MANAGER = "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"
RULE = f"type='signal',sender='{LOGIND}',path='{PATH}',interface='{MANAGER}',member='PrepareForSleep'"
BUS = "org.freedesktop.DBus"
CALL_S = 5.0  # for one answer of the bus

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def sleep_watched(
    before: Callable[[], Awaitable[None]], after: Callable[[], None], address: str | None = None
) -> AsyncIterator[None]:
    """While the block runs, `before` is called and awaited before the machine sleeps, `after` when it is awake again.

    Without dbus-fast, a system bus or logind nothing is watched, which the log says at level debug.
    """
    watch = SleepWatch(before, after)
    try:
        async with asyncio.timeout(CALL_S):
            await watch.start(address)
    except Exception as error:  # whatever a bus may do: the device runs without
        log.debug("sleep is not watched: %s: %s", type(error).__name__, error)
    try:
        yield
    finally:
        await watch.close()


class SleepWatch:
    """Holds the inhibitor while the machine is awake."""

    def __init__(self, before: Callable[[], Awaitable[None]], after: Callable[[], None]) -> None:
        self._before, self._after = before, after
        self._bus: Any = None
        self._inhibitor = -1
        self._signals: asyncio.Queue[tuple[str, bool]] = asyncio.Queue(16)  # who says so, and what
        self._following: asyncio.Task[None] | None = None

    async def start(self, address: str | None = None) -> None:
        """Raises what stands against it."""
        from dbus_fast import BusType
        from dbus_fast.aio import MessageBus

        self._bus = MessageBus(bus_address=address, bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
        await self._bus.connect()
        self._bus.add_message_handler(self._heard)
        await self._ask_bus("AddMatch", RULE)
        await self._inhibit()
        self._following = asyncio.create_task(self._follow(), name="sleep watch")

    async def close(self) -> None:
        """May be called twice."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        self._release()
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.disconnect()

    def _heard(self, message: Any) -> bool:
        from dbus_fast import MessageType

        mine = message.interface == MANAGER and message.member == "PrepareForSleep" and message.path == PATH
        if (
            message.message_type is MessageType.SIGNAL
            and mine
            and message.signature == "b"
            and not self._signals.full()
        ):
            self._signals.put_nowait((str(message.sender), bool(message.body[0])))
        return False

    async def _follow(self) -> None:
        while True:
            sender, sleeping = await self._signals.get()
            if not await self._is_logind(sender):
                continue
            if sleeping:
                log.info("the machine is about to sleep")
                try:
                    await self._before()
                finally:
                    self._release()
            else:
                log.info("the machine is awake again")
                self._after()
                with contextlib.suppress(Exception):  # the next sleep then comes without a farewell
                    await self._inhibit()

    async def _is_logind(self, sender: str) -> bool:
        """A signal that is addressed to this connection comes whoever sends it, whatever the rule says."""
        with contextlib.suppress(OSError):
            return str((await self._ask_bus("GetNameOwner", LOGIND)).body[0]) == sender
        return False

    async def _inhibit(self) -> None:
        self._release()
        words = ["sleep", "peerllm", "hands over what this device computes for others", "delay"]
        answer = await self._call(LOGIND, PATH, MANAGER, "Inhibit", "ssss", words)
        self._inhibitor = answer.unix_fds[answer.body[0]]

    def _release(self) -> None:
        inhibitor, self._inhibitor = self._inhibitor, -1
        if inhibitor >= 0:
            os.close(inhibitor)

    async def _ask_bus(self, member: str, text: str) -> Any:
        return await self._call(BUS, "/org/freedesktop/DBus", BUS, member, "s", [text])

    async def _call(self, where: str, path: str, interface: str, member: str, signature: str, body: list[Any]) -> Any:
        from dbus_fast import Message, MessageType

        asked = Message(
            destination=where, path=path, interface=interface, member=member, signature=signature, body=body
        )
        async with asyncio.timeout(CALL_S):
            answer = await self._bus.call(asked)
        if answer is None or answer.message_type is MessageType.ERROR:
            raise OSError(f"{member}: {answer.body[0] if answer is not None and answer.body else 'no answer'}")
        return answer
