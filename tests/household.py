"""Real devices for tests and benchmarks: `peerllm up` processes, driven through the CLI as a person would."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

READY_TIMEOUT_S = 120  # importing torch on a busy two-core machine is slow
COMMAND_TIMEOUT_S = 240
STOP_TIMEOUT_S = 20


class Device:
    """One `peerllm up` process; `prefix` puts it into a namespace or on a core."""

    def __init__(
        self,
        data_dir: Path,
        name: str,
        *,
        memory: str = "2GB",
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        api: str = "127.0.0.1:0",
        port: int = 0,
    ) -> None:
        self.data_dir, self.name, self.prefix = data_dir, name, list(prefix)
        self.argv = [
            *prefix,
            sys.executable,
            "-m",
            "peerllm",
            "up",
            "--data",
            str(data_dir),
            "--name",
            name,
            "--port",
            str(port),
            "--api",
            api,
            "--memory",
            memory,
            "--threads",
            "1",
            *options,
        ]
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> Device:
        """Launch; `wait_ready` afterwards, so that several start at once."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.log = (self.data_dir / "log.txt").open("ab")
        self.process = subprocess.Popen(
            self.argv, stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        return self

    def wait_ready(self) -> Device:
        """Until it prints its `ready URL` line."""
        assert self.process is not None
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            deadline = time.monotonic() + READY_TIMEOUT_S
            while selector.select(max(0.0, deadline - time.monotonic())):
                line = self.process.stdout.readline()
                if not line:
                    raise AssertionError(f"{self.name} ended before it was ready:\n{self.log_tail()}")
                if line.startswith("ready "):
                    self.url = line.split()[1]
                    return self
        raise AssertionError(f"{self.name} was not ready in {READY_TIMEOUT_S} s:\n{self.log_tail()}")

    def log_tail(self) -> str:
        return (self.data_dir / "log.txt").read_text(errors="replace")[-3000:]

    def cli(self, command: str, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`peerllm COMMAND --data DIR ARGS` where this device lives."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "peerllm", command, "--data", str(self.data_dir), *args],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{self.name}: {command} {args} ended with {done.returncode}: {done.stderr}\n{self.log_tail()}"
            )
        return done

    def status(self) -> dict[str, Any]:
        """What `peerllm status --json` prints, from the API itself where it can be reached."""
        found: dict[str, Any]
        found = json.loads(self.cli("status", "--json").stdout) if self.prefix else self.get("/peerllm/v1/status")
        return found

    def token(self) -> str:
        return (self.data_dir / "token").read_text().strip()

    def open(
        self, path: str, body: bytes | None = None, timeout: float = COMMAND_TIMEOUT_S
    ) -> http.client.HTTPResponse:
        """What the device's API answers to a GET, or to a POST of a body (devices outside namespaces).

        An HTTPError can be read as always, and shows what the device answered and logged where nobody expects it.
        """
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token()}"}
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(
                urllib.request.Request(self.url + path, body, headers), timeout=timeout
            )
        except urllib.error.HTTPError as error:
            said = error.read()
            readable = urllib.error.HTTPError(error.url, error.code, error.msg, error.headers, io.BytesIO(said))
            readable.add_note(f"{self.name} answered {said[:2000].decode(errors='replace')}")
            readable.add_note(f"and logged:\n{self.log_tail()}")
            raise readable from None
        return answer

    def get(self, path: str) -> Any:
        """JSON from the device's API."""
        with self.open(path) as response:
            return json.load(response)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """JSON in, JSON out."""
        with self.open(path, json.dumps(body).encode()) as response:
            return json.load(response)

    def slots_in_use(self) -> int:
        """Over all stages in its engine."""
        return sum(stage["slots_in_use"] for stage in self.get("/peerllm/v1/engine")["stages"])

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(STOP_TIMEOUT_S)

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if it does not heed it; the exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()
        return self.process.returncode


def pair(inviter: Device, joiner: Device, host: str = "127.0.0.1") -> None:
    """One code: the joiner enters the inviter's household."""
    invitation = json.loads(inviter.cli("invite", "--json").stdout)
    joiner.cli("join", invitation["code"], "--at", f"{host}:{invitation['port']}")


@contextlib.contextmanager
def household(
    directory: Path,
    names: Sequence[str],
    *,
    memory: str | Mapping[str, str] = "2GB",
    options: Sequence[str] = ("--no-mdns",),
    prefixes: Mapping[str, Sequence[str]] | None = None,
    apis: Mapping[str, str] | None = None,
) -> Iterator[list[Device]]:
    """Paired devices on loopback, the first one the inviter; ended when the block is left."""
    devices = [
        Device(
            directory / name,
            name,
            memory=memory if isinstance(memory, str) else memory[name],
            options=options,
            prefix=(prefixes or {}).get(name, ()),
            api=(apis or {}).get(name, "127.0.0.1:0"),
        )
        for name in names
    ]
    try:
        for device in devices:
            device.start()
        for device in devices:
            device.wait_ready()
        for device in devices[1:]:
            pair(devices[0], device)
        yield devices
    finally:
        for device in devices:
            device.stop()
