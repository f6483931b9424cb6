"""A system bus of our own with a logind that is played: nothing sleeps before the farewell is over."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peerllm.cli.service.sleep_watch import LOGIND, MANAGER, PATH, sleep_watched

BOUND_S = 10.0
CONFIG = """<busconfig><type>system</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/>
<allow receive_sender="*"/></policy></busconfig>"""


class Logind:
    """Answers Inhibit with one end of a pipe, and knows by the other end whether it was closed."""

    def __init__(self, bus: Any) -> None:
        self.bus, self.asked, self.open_ends = bus, asyncio.Queue[list[Any]](), list[int]()
        self.refuses, self.asker = False, ""
        bus.add_message_handler(self._heard)

    def _heard(self, message: Any) -> Any:
        from dbus_fast import Message, MessageType

        if message.member != "Inhibit" or message.message_type is not MessageType.METHOD_CALL:
            return False
        self.asked.put_nowait(message.body)
        self.asker = str(message.sender)
        if self.refuses:
            return Message.new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "Permission denied")
        read, write = os.pipe()
        self.open_ends.append(read)
        answer = Message.new_method_return(message, "h", [0], [write])
        asyncio.get_running_loop().call_later(0.5, os.close, write)  # once it was sent
        return answer

    async def signal(self, sleeping: bool) -> None:
        from dbus_fast import Message

        await self.bus.send(Message.new_signal(PATH, MANAGER, "PrepareForSleep", "b", [sleeping]))

    async def released(self) -> bool:
        """The inhibitor that was given last is closed."""
        closed, end, loop = asyncio.Event(), self.open_ends[-1], asyncio.get_running_loop()
        loop.add_reader(end, closed.set)
        try:
            async with asyncio.timeout(BOUND_S):
                await closed.wait()
        finally:
            loop.remove_reader(end)
        return os.read(end, 1) == b""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    if shutil.which("dbus-daemon") is None:
        pytest.skip("needs dbus-daemon")
    config = tmp_path / "bus.conf"
    config.write_text(CONFIG.format(path=tmp_path / "bus"))
    argv = ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        yield daemon.stdout.readline().strip()
        daemon.kill()


@pytest.fixture
async def logind(address: str) -> Any:
    from dbus_fast.aio import MessageBus

    bus = await MessageBus(bus_address=address, negotiate_unix_fd=True).connect()
    made = Logind(bus)
    await bus.request_name(LOGIND)
    yield made
    bus.disconnect()
    for one in made.open_ends:
        os.close(one)


async def test_the_machine_sleeps_when_the_farewell_is_over_and_is_watched_again_afterwards(
    address: str, logind: Logind
) -> None:
    farewell, woken = asyncio.Event(), asyncio.Event()
    begun: asyncio.Queue[str] = asyncio.Queue()

    async def before() -> None:
        begun.put_nowait("farewell")
        await farewell.wait()

    async with asyncio.timeout(2 * BOUND_S), sleep_watched(before, woken.set, address):
        assert (await logind.asked.get())[0::3] == ["sleep", "delay"]
        for _ in range(2):
            await logind.signal(True)
            await begun.get()
            releasing = asyncio.create_task(logind.released())
            done, _pending = await asyncio.wait({releasing}, timeout=0.7)
            assert not done and not woken.is_set()  # logind would still wait
            farewell.set()
            assert await releasing
            await logind.signal(False)
            await woken.wait()
            await logind.asked.get()  # the next inhibitor
            farewell.clear()
            woken.clear()


async def test_a_device_that_ends_keeps_no_machine_awake(address: str, logind: Logind) -> None:
    async def before() -> None:
        raise AssertionError

    async with sleep_watched(before, lambda: None, address):
        await logind.asked.get()
    assert await logind.released()


async def test_a_signal_of_somebody_else_puts_nobody_to_sleep(address: str, logind: Logind) -> None:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

    begun: asyncio.Queue[str] = asyncio.Queue()
    woken = asyncio.Event()

    async def before() -> None:
        begun.put_nowait("farewell")

    stranger = await MessageBus(bus_address=address).connect()
    async with asyncio.timeout(BOUND_S), sleep_watched(before, woken.set, address):
        await logind.asked.get()
        for path, member in ((PATH, "PrepareForSleep"), (PATH, "PrepareForShutdown"), ("/x", "PrepareForSleep")):
            await stranger.send(Message.new_signal(path, MANAGER, member, "b", [True]))
        addressed = Message.new_signal(PATH, MANAGER, "PrepareForSleep", "b", [True])
        addressed.destination = logind.asker  # no rule is asked for what is sent to one connection
        await stranger.send(addressed)
        await logind.signal(True)
        await logind.signal(False)
        await woken.wait()
        assert begun.qsize() == 1
    stranger.disconnect()


async def test_without_leave_or_bus_the_device_runs_all_the_same(
    address: str, logind: Logind, caplog: pytest.LogCaptureFixture
) -> None:
    async def before() -> None:
        raise AssertionError

    caplog.set_level(logging.DEBUG, "peerllm")
    logind.refuses = True
    async with asyncio.timeout(BOUND_S), sleep_watched(before, lambda: None, address):
        await logind.asked.get()
    assert "Permission denied" in caplog.text
    for nowhere in ("unix:path=/nowhere/bus", "nonsense"):
        caplog.clear()
        async with asyncio.timeout(BOUND_S), sleep_watched(before, lambda: None, nowhere):
            assert "sleep is not watched" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert not [task for task in asyncio.all_tasks() if "sleep" in task.get_name()]
