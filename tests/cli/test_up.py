"""`peerllm up` as a real process: what it prints and writes, how it refuses to start, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from peerllm.cli import device_process
from peerllm.cli.device import LocalDevice
from peerllm.cli.parser import build_parser
from peerllm.cli.up import settings_of
from peerllm.daemon.engine_link.engine_host import EngineHost
from peerllm.daemon.settings import Settings
from peerllm.engine.messages import Configured
from tests.household import READY_TIMEOUT_S, STOP_TIMEOUT_S, Device

ALONE = ("--loopback",)


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


async def test_it_says_at_once_that_it_starts_and_every_command_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine's start is held back until status was asked."""
    gate, told, real = asyncio.Event(), asyncio.Queue[str](), EngineHost.start

    async def held(host: EngineHost) -> Configured:
        await gate.wait()
        return await real(host)

    monkeypatch.setattr(EngineHost, "start", held)
    monkeypatch.setattr(device_process, "tell", told.put_nowait)
    argv = ["up", "--data", str(tmp_path), "--name", "kitchen", "--port", "0", "--api", "127.0.0.1:0"]
    settings = settings_of(build_parser().parse_args([*argv, "--memory", "999TB", *ALONE]))
    serving = asyncio.create_task(device_process.serve(settings, [], False))
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            line = await told.get()
            device = LocalDevice(tmp_path)
            assert line == f"The page of kitchen, which says how far it is: {device.url}"
            (me,) = (await asyncio.to_thread(device.get, "/peerllm/v1/status"))["devices"]
            assert (me["name"], me["state"], me["problem"]) == ("kitchen", "starting", "is starting its engine")
            assert "ready" not in capsys.readouterr().out
            invited = asyncio.create_task(asyncio.to_thread(device.post, "/peerllm/v1/invite", {}))
            gate.set()
            line = await told.get()
            (me,) = (await asyncio.to_thread(device.get, "/peerllm/v1/status"))["devices"]
            assert (me["state"], me["problem"]) == ("online", "")
            assert re.fullmatch(
                r"kitchen is ready and lends (.+) of its \1: --memory 999 TB is more than it can lend", line
            )
            assert (await invited)["hosts"] == ["127.0.0.1", "::1"]
            assert capsys.readouterr().out == f"ready {device.url}\n"
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
    assert not (tmp_path / "daemon.json").exists()


def test_what_became_of_the_memory_asked_for_is_said_where_it_is_less(tmp_path: Path) -> None:
    me = {"lent_bytes": 4_000_000_000, "memory_bytes": 16_000_000_000}
    plain = "kitchen is ready and lends 4.00 GB of its 16.0 GB"
    for wish in (None, 3_000_000_000, 4_000_000_000):
        settings = Settings(tmp_path, "kitchen", memory_bytes=wish)
        assert device_process.ready_text(settings, me) == plain
    more = Settings(tmp_path, "kitchen", memory_bytes=4_100_000_000)
    assert device_process.ready_text(more, me) == f"{plain}: --memory 4.10 GB is more than it can lend"


def test_its_first_words_come_before_anything_large_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys, peerllm.cli.main as m, peerllm.cli.up as up\n"
        "def first(text):\n"
        "    print(text)\n"
        "    print(sorted({'aiohttp', 'numpy', 'zeroconf', 'cryptography', 'tokenizers'} & set(sys.modules)))\n"
        "    sys.exit()\n"
        "up.tell = first\n"
        f"m.main(['up', '--data', {str(tmp_path)!r}, '--name', 'kitchen'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    said, imported = done.stdout.splitlines()
    assert said.startswith("kitchen is starting") and str(tmp_path) in said and imported == "[]"


async def test_a_device_that_is_stopped_while_it_starts_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = asyncio.Queue[str]()

    async def held(_: EngineHost) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(EngineHost, "start", held)
    monkeypatch.setattr(device_process, "tell", told.put_nowait)
    argv = ["up", "--data", str(tmp_path), "--port", "0", "--api", "127.0.0.1:0", *ALONE]
    serving = asyncio.create_task(device_process.serve(settings_of(build_parser().parse_args(argv)), [], False))
    async with asyncio.timeout(STOP_TIMEOUT_S):
        await told.get()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
    assert not (tmp_path / "daemon.json").exists()


def test_a_device_for_this_machine_only_opens_no_socket_for_mdns(device: Device) -> None:
    assert device.process is not None
    ports = {one.laddr.port for one in psutil.Process(device.process.pid).net_connections("udp") if one.laddr}
    assert 5353 not in ports


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
