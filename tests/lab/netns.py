"""A LAN in one machine: network namespaces on a bridge that lives in a namespace of its own, so nothing leaks out.

    with Lab(3) as lab:
        process = lab.exec(0, ["peerllm", "up"], cpu=0)     # a Popen; stopped by the lab at the latest
        lab.run(1, ["peerllm", "status", "--json"]).stdout  # waits, raises on failure
        lab.set_link(2, up=False)                           # pull the cable
        lab.limit(1, mbps=100)                              # both directions

Host i is 10.<x>.<y>.<i + 1>/24 on `eth0`, with a link-local IPv6 address; mDNS crosses the bridge.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pytest

COMMAND_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0  # a host's processes get this long between SIGTERM and SIGKILL
IPV6_TIMEOUT_S = 5.0
PREFIX = "peerlab"
NAME = re.compile(PREFIX + r"-(\d+)-\d+-\w+")

CLONE_NEWNET = 0x40000000
T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def _call(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)


def why_no_lab() -> str:
    """Why namespaces cannot be made here, or "" when they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the ip command (iproute2)"
    probe = f"{PREFIX}-{os.getpid()}-{next(_numbers)}-probe"
    made = _call("ip", "netns", "add", probe)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    # Some kernels give namespaces but neither bridges nor veth pairs.
    bridge = _call("ip", "-n", probe, "link", "add", "br0", "type", "bridge")
    _call("ip", "netns", "del", probe)
    return f"no bridges here: {bridge.stderr.strip()}" if bridge.returncode else ""


_reason: list[str] = []


def require_lab() -> None:
    """Skip the calling test, with the reason, where the laboratory cannot be built."""
    if not _reason:
        _reason.append(why_no_lab())
    if _reason[0]:
        pytest.skip(_reason[0])


def _ip(*argv: str) -> str:
    done = _call("ip", *argv)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _destroy(namespace: str) -> None:
    """Stop what runs in the namespace, then remove it with its interfaces."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    sent = signal.SIGTERM
    while True:
        listed = _call("ip", "netns", "pids", namespace)
        pids = [int(pid) for pid in listed.stdout.split()]
        if not pids:
            break
        if time.monotonic() > deadline:
            sent = signal.SIGKILL
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # a frozen process would never see the other signal
                os.kill(pid, sent)
        if time.monotonic() > deadline + STOP_TIMEOUT_S:
            break
        time.sleep(0.05)
    _call("ip", "netns", "del", namespace)


def remove_stale() -> None:
    """Remove the namespaces of laboratories whose process died."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        match = NAME.fullmatch(name)
        if match and not _alive(int(match[1])):
            _destroy(name)


class Lab:
    """`hosts` network namespaces on one bridge; a context manager that always cleans up."""

    def __init__(self, hosts: int) -> None:
        require_lab()
        number = next(_numbers)
        self.size = hosts
        self._stem = f"{PREFIX}-{os.getpid()}-{number}"
        self._switch = f"{self._stem}-switch"
        self._subnet = f"10.{os.getpid() % 200 + 20}.{number % 250}"
        self._running: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Lab:
        remove_stale()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def namespace(self, host: int) -> str:
        """The namespace's name, for `ip netns exec`."""
        return f"{self._stem}-host{host}"

    def address(self, host: int) -> str:
        """The host's IPv4 address on the bridge."""
        return f"{self._subnet}.{host + 1}"

    def address6(self, host: int) -> str:
        """The host's link-local IPv6 address, without a zone."""
        text = _ip("-n", self.namespace(host), "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link")
        match = re.search(r"inet6 ([0-9a-f:]+)/", text)
        return match[1] if match else ""

    def argv(self, host: int, argv: Sequence[str | Path], cpu: int | None = None) -> list[str]:
        """The command line that runs `argv` on a host, its process id being that of the program itself."""
        pinned = ["taskset", "-c", str(cpu)] if cpu is not None else []
        return ["ip", "netns", "exec", self.namespace(host), *pinned, *(str(part) for part in argv)]

    def exec(
        self, host: int, argv: Sequence[str | Path], *, cpu: int | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Start a program on a host. The lab stops it when it closes."""
        process = subprocess.Popen(self.argv(host, argv, cpu), **popen)
        self._running.append(process)
        return process

    def run(
        self,
        host: int,
        argv: Sequence[str | Path],
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
        check: bool = True,
        cpu: int | None = None,
        **popen: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host to its end; its output is text."""
        return subprocess.run(
            self.argv(host, argv, cpu), capture_output=True, text=True, timeout=timeout_s, check=check, **popen
        )

    def within(self, host: int, do: Callable[[], T]) -> T:
        """Do it in a thread that is in the host's namespace."""

        def enter() -> T:
            with Path("/run/netns", self.namespace(host)).open() as namespace:
                if _libc.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"{self.namespace(host)} cannot be entered")
            return do()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter).result()

    def set_link(self, host: int, up: bool) -> None:
        """Plug a host's cable in or pull it: the host keeps its addresses but nothing passes."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up" if up else "down")

    def limit(self, host: int, mbps: float | None) -> None:
        """Bound a host's bandwidth in both directions with a token bucket; None lifts it."""
        for namespace, device in ((self.namespace(host), "eth0"), (self._switch, f"port{host}")):
            if mbps is None:
                _call("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
                continue
            burst = max(32_000, int(mbps * 1e6 / 8 / 250))  # bytes: what passes in one timer tick of 4 ms
            argv = ["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf"]
            argv += ["rate", f"{int(mbps * 1000)}kbit", "burst", str(burst), "latency", "50ms"]
            subprocess.run(argv, check=True, capture_output=True, timeout=COMMAND_TIMEOUT_S)

    def close(self) -> None:
        """Stop every program and remove every namespace; can be called twice."""
        for host in range(self.size):
            _destroy(self.namespace(host))
        _destroy(self._switch)
        for process in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._running.clear()

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for host in range(self.size):
            name = self.namespace(host)
            _ip("netns", "add", name)
            # A link-local address may be used at once, not after a second of duplicate detection.
            self.run(host, ["sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad"], check=False)
            port = f"port{host}"
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "multicast", "on", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "route", "add", "224.0.0.0/4", "dev", "eth0")
        deadline = time.monotonic() + IPV6_TIMEOUT_S
        while time.monotonic() < deadline and not all(self.address6(host) for host in range(self.size)):
            time.sleep(0.02)
