"""`peerllm up` as a real process: what it prints and writes, how it refuses to start, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.household import STOP_TIMEOUT_S, Device

ALONE = ("--no-mdns", "--loopback")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    one = Device(tmp_path_factory.mktemp("up") / "kitchen", "kitchen", options=ALONE).start().wait_ready()
    yield one
    one.stop()


def start(data: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """One that will not stay up."""
    argv = [sys.executable, "-m", "peerllm", "up", "--data", str(data), "--threads", "1", *ALONE, *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def test_the_other_commands_find_it(device: Device) -> None:
    written = device.data_dir / "daemon.json"
    assert device.process is not None
    assert json.loads(written.read_text()) == {"url": device.url, "pid": device.process.pid}
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert stat.S_IMODE((device.data_dir / "token").stat().st_mode) == 0o600
    assert device.status()["device"]["name"] == "kitchen"
    assert "kitchen (this one)" in device.cli("devices").stdout


def test_without_household_and_model_the_commands_say_so(device: Device) -> None:
    chat = device.cli("chat", "hi", check=False)
    assert (chat.returncode, chat.stdout) == (1, "")
    assert "peerllm run builtin" in chat.stderr
    wrong = device.cli("join", "K7-4PQ9MX", "--at", "127.0.0.1:1", check=False)
    assert wrong.returncode == 1
    assert len(wrong.stderr.splitlines()) == 1
    assert device.cli("status").returncode == 0


@pytest.mark.parametrize("what", ["data", "api", "port"])
def test_what_is_taken_is_one_line_and_harms_nobody(device: Device, tmp_path: Path, what: str) -> None:
    free = ["--port", "0", "--api", "127.0.0.1:0"]
    if what == "data":
        done, word = start(device.data_dir, *free), str(device.data_dir)
    elif what == "api":
        done, word = start(tmp_path, "--port", "0", "--api", device.url.removeprefix("http://")), "--api"
    else:
        done, word = (
            start(tmp_path, "--port", str(device.status()["network"]["port"]), "--api", "127.0.0.1:0"),
            "--port",
        )
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("peerllm: ")
    assert word in last
    assert "Traceback" not in done.stderr
    assert device.status()["device"]["name"] == "kitchen"


def test_data_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = start(tmp_path / "file" / "data")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "--data" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_gracefully_and_systemd_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    notify = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(notify))
        listening.settimeout(STOP_TIMEOUT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(notify))
        one = Device(tmp_path / "d", "d", options=ALONE).start().wait_ready()
        assert listening.recv(64) == b"READY=1"
        assert one.process is not None
        one.process.send_signal(number)
        assert listening.recv(64) == b"STOPPING=1"
    assert one.process.wait(STOP_TIMEOUT_S) == 0
    assert one.stop() == 0
    assert not (tmp_path / "d" / "daemon.json").exists()
    assert "Traceback" not in one.log_tail()


def test_it_ends_with_the_parent_that_asked_for_it(tmp_path: Path) -> None:
    read, write = os.pipe()
    argv = [sys.executable, "-m", "peerllm", "up", "--data", str(tmp_path), "--port", "0", "--api", "127.0.0.1:0",
            "--exit-with-parent", *ALONE]  # fmt: skip
    with subprocess.Popen(argv, stdin=read, stdout=subprocess.PIPE, text=True) as process:
        os.close(read)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready ")
        os.close(write)
        assert process.wait(STOP_TIMEOUT_S) == 0
