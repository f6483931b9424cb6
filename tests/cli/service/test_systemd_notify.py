"""The watchdog hears of the event loop, and of a loop that is stuck it hears nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from peerllm.cli.service.systemd_notify import notify, watchdog_fed, watchdog_s

BOUND_S = 10.0
PERIOD_S = 0.03


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(BOUND_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", str(int(PERIOD_S * 1e6)))
        yield listening


async def test_a_loop_that_goes_on_feeds_it_and_a_stuck_one_does_not(manager: socket.socket) -> None:
    async with watchdog_fed():
        for _ in range(5):
            assert await asyncio.to_thread(manager.recv, 64) == b"WATCHDOG=1"
        manager.settimeout(0)
        with contextlib.suppress(BlockingIOError):  # what is there already
            while manager.recv(64):
                pass
        manager.settimeout(4 * PERIOD_S)
        with pytest.raises(TimeoutError):  # this waits on the loop, which stands still
            manager.recv(64)
    assert not [task for task in asyncio.all_tasks() if "watchdog" in task.get_name()]


async def test_nothing_is_fed_where_nobody_asks(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    assert watchdog_s() == pytest.approx(PERIOD_S)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_s() == pytest.approx(PERIOD_S)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))  # meant for another process
    assert watchdog_s() is None
    monkeypatch.delenv("WATCHDOG_PID")
    for text in ("", "0", "soon"):
        monkeypatch.setenv("WATCHDOG_USEC", text)
        assert watchdog_s() is None
    async with watchdog_fed():
        assert not [task for task in asyncio.all_tasks() if "watchdog" in task.get_name()]


def test_a_manager_that_does_not_read_or_is_gone_stops_nothing(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in range(5000):
        notify("STATUS=" + "x" * 500)
    for address in (str(tmp_path / "gone"), "@gone", "relative", ""):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("READY=1")
