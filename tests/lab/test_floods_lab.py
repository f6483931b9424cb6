"""Floods, each while four answers are streamed over two devices: none is disturbed, nobody is kept out.

The devices may have 1,024 descriptors each. A third device belongs to the household and has gone bad.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.household import Device, household

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600), pytest.mark.skipif(sys.platform != "linux", reason="prlimit")]
FULL = os.environ.get("PEERLLM_FULL") == "1"
DESCRIPTORS = 1024
SILENT = 2000
SECONDS = 40.0 if FULL else 20.0
STREAMS, CONTEXT, TOKENS = 4, 512, 160
QUESTIONS = [f"Tell me a story about {what}." for what in ("a dog", "the sea", "a train", "two friends")]
LIMIT = ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}")


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    names = ["laptop", "mini-pc", "rogue"]
    memory = [str(size) for size in limits(sizes_of(MODEL_DIR, STREAMS, CONTEXT), 2)] + ["1MB"]
    directory = tmp_path_factory.mktemp("floods")
    with household(
        directory, names, memory=dict(zip(names, memory, strict=True)), prefixes={name: LIMIT for name in names}
    ) as started:
        started[0].cli("run", "builtin", "--slots", str(STREAMS), "--context", str(CONTEXT))
        yield started


class Stream(threading.Thread):
    """One answer, read as it comes."""

    def __init__(self, device: Device, question: str) -> None:
        super().__init__(daemon=True)
        self.text, self.finish, self.longest_s = "", "", 0.0
        body = {
            "model": "builtin",
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "temperature": 0,
            "max_tokens": TOKENS,
        }
        self._open = partial(device.open, "/v1/chat/completions", json.dumps(body).encode(), 120)

    def run(self) -> None:
        last = time.monotonic()
        with self._open() as response:
            for line in response:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    self.longest_s, last = max(self.longest_s, now - last), now
                    choice = json.loads(line[6:])["choices"][0]
                    self.text += choice["delta"].get("content") or ""
                    self.finish = choice["finish_reason"] or self.finish


def answers(device: Device) -> list[Stream]:
    """Those to all questions, streamed at once."""
    streams = [Stream(device, question) for question in QUESTIONS]
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join(240)
        assert not stream.is_alive() and stream.finish in ("stop", "length"), stream.finish
    return streams


def flooder(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.lab.flooder", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def control_port(device: Device) -> int:
    return int(device.status()["network"]["port"])


def undisturbed(devices: list[Device], wanted: list[str], floods: list[subprocess.Popen[str]]) -> list[int]:
    """Stream answers until the floods are over; what these sent."""
    rounds = 0
    while any(flood.poll() is None for flood in floods):
        assert [stream.text for stream in answers(devices[0])] == wanted
        states = {one["name"]: one["state"] for one in devices[0].status()["devices"]}
        assert states["mini-pc"] == "online", states
        rounds += 1
    assert rounds > 0
    said = [int(flood.communicate()[0]) for flood in floods]
    assert [stream.text for stream in answers(devices[0])] == wanted
    epochs = {one["epoch"] for one in devices[0].status()["deployments"]}
    assert epochs == {1}, "nothing was planned anew"
    return said


def test_2000_silent_connections_under_a_limit_of_1024_descriptors(devices: list[Device], tmp_path: Path) -> None:
    laptop = devices[0]
    api = int(laptop.url.rsplit(":", 1)[1])
    invitation = json.loads(laptop.cli("invite", "--json").stdout)
    ports = [api, *(control_port(device) for device in devices[:2]), *data_ports(devices[:2]), invitation["port"]]
    newcomer = Device(tmp_path / "newcomer", "newcomer", memory="1MB", options=("--no-mdns",)).start().wait_ready()
    wanted = [stream.text for stream in answers(laptop)]
    flood = flooder("silent", SECONDS, SILENT, "127.0.0.1", *ports)
    try:
        newcomer.cli("join", invitation["code"], "--at", f"127.0.0.1:{invitation['port']}")
        (opened,) = undisturbed(devices, wanted, [flood])
        assert opened >= SILENT, "they were cut and came again"
        assert {"newcomer", "mini-pc"} <= {one["name"] for one in laptop.status()["devices"]}
    finally:
        flood.kill()
        newcomer.cli("leave", check=False)
        newcomer.stop()
    assert descriptors(laptop) < DESCRIPTORS / 4, "nothing is left of it"


def test_a_member_that_sends_all_it_can(devices: list[Device]) -> None:
    rogue = devices[2]
    rogue.kill()
    wanted = [stream.text for stream in answers(devices[0])]
    floods = [
        flooder("member", SECONDS, rogue.data_dir, "127.0.0.1", control_port(device), device.data_dir / "device.crt")
        for device in devices[:2]
    ]
    try:
        sent = undisturbed(devices, wanted, floods)
    finally:
        for flood in floods:
            flood.kill()
    assert min(sent) > 4 << 20
    rogue.start().wait_ready()
    assert "rogue" in {one["name"] for one in devices[0].status()["devices"]}


def data_ports(devices: list[Device]) -> list[int]:
    """By what the kernel says: each device's engine listens on one port besides."""
    found = []
    for device in devices:
        assert device.process is not None
        found += listening(descendants(device.process.pid)) - {control_port(device)}
    return [port for port in found if not any(device.url.endswith(f":{port}") for device in devices)]


def descendants(pid: int) -> set[int]:
    found = {pid}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found |= descendants(int(path.parent.name))
    return found


def listening(pids: set[int]) -> set[int]:
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            inodes |= {target[8:-1]} if target.startswith("socket:[") else set()
    ports = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def descriptors(device: Device) -> int:
    assert device.process is not None
    return len(list(Path(f"/proc/{device.process.pid}/fd").iterdir()))
