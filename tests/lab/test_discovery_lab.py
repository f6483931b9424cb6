"""Three hosts on a bridge: they find each other by mDNS, pair over it, and notice a pulled cable."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.netns import Lab

ROOT = Path(__file__).parents[2]
FOUND_S = 3.0  # from the start of the last device until each has seen every other
WAIT_S = 30.0

pytestmark = pytest.mark.lab


class Host:
    """A Network in a namespace; its lines are waited for."""

    def __init__(self, lab: Lab, host: int, name: str, directory: Path, *options: str) -> None:
        argv = [sys.executable, "-m", "tests.daemon.networks", str(directory), name, *options]
        self.name = name
        self.lines: list[tuple[float, str]] = []
        self._queue: queue.Queue[tuple[float, str]] = queue.Queue()
        self.process = lab.exec(
            host, argv, cpu=host % 2, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        threading.Thread(target=self._read, name=f"lines of {name}", daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put((time.monotonic(), line.strip()))

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def until(self, start: str, since: float = 0.0) -> tuple[float, str]:
        """When a line that begins so came, and the line."""
        deadline = time.monotonic() + WAIT_S
        while True:
            for at, line in self.lines:
                if line.startswith(start) and at >= since:
                    return at, line
            try:
                self.lines.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"{self.name} never said {start!r}, only {self.lines}") from None


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(3) as made:
        yield made


def test_three_hosts_find_each_other_pair_and_notice_a_pulled_cable(lab: Lab, tmp_path: Path) -> None:
    names = ("anna", "bert", "cleo")
    hosts = [Host(lab, number, name, tmp_path, "mdns", "everywhere") for number, name in enumerate(names)]
    started = max(host.until("port")[0] for host in hosts)
    for host in hosts:
        for number, name in enumerate(names):
            if name != host.name:
                both = f"seen {name} {lab.address(number)} {lab.address6(number)}%"
                at, _ = host.until(both)
                assert at - started <= FOUND_S, f"{host.name} saw {name} after {at - started:.1f} s"

    anna, bert, cleo = hosts
    for inviter, joiner in ((anna, bert), (bert, cleo)):
        asked = time.monotonic()
        inviter.say("invite")
        code = inviter.until("code", since=asked)[1].split()[1]
        joiner.say(f"join {code}")
        assert joiner.until("joined")[1] == f"joined {inviter.name}"
    for host in hosts:
        for name in set(names) - {host.name}:
            host.until(f"online {name}")

    pulled = time.monotonic()
    lab.set_link(2, up=False)
    for host in (anna, bert):
        assert host.until("gone cleo", since=pulled)[0] - pulled <= 1.5
    plugged = time.monotonic()
    lab.set_link(2, up=True)
    for host in (anna, bert):
        host.until("online cleo", since=plugged)


def test_multicast_blocked_hosts_reach_each_other_by_static_peers(lab: Lab, tmp_path: Path) -> None:
    anna = Host(lab, 0, "anna", tmp_path, "everywhere")
    port = anna.until("port")[1].split()[1]
    bert = Host(lab, 1, "bert", tmp_path, "everywhere", f"{lab.address(0)}:{port}")
    cleo = Host(lab, 2, "cleo", tmp_path, "everywhere")
    # One of them comes over IPv6, by a link-local address that means nothing without its zone.
    for joiner, at in ((bert, lab.address(0)), (cleo, f"{lab.address6(0)}%eth0")):
        asked = time.monotonic()
        joiner.until("port")
        anna.say("invite")
        _, code, door = anna.until("code", since=asked)[1].split()
        joiner.say(f"join {code} {at} {door}")
        assert joiner.until("joined")[1] == "joined anna"
    bert.until("online cleo")
    cleo.until("online bert")
