"""A household in namespaces whose devices are killed, frozen, unplugged and brought back while answers are streamed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.household import Device
from tests.lab.netns import Lab

WAIT_S = 120.0


@dataclass(slots=True)
class Answer:
    """What came of one stream: token ids, with the time at which each came."""

    number: int
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    over: dict[str, Any] | None = None
    comments: list[str] = field(default_factory=list)


class Listener:
    """Streams answers from one device, from within its namespace."""

    def __init__(self, lab: Lab, host: int, device: Device) -> None:
        argv = [sys.executable, "-m", "tests.lab.stream_listener", device.url, device.token()]
        self._process = lab.exec(host, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answers: dict[int, Answer] = {}
        self._changed = threading.Condition()
        self._number = 0
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()

    def ask(self, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Answer:
        self._number += 1
        answer = self._answers[self._number] = Answer(self._number)
        assert self._process.stdin is not None
        order = {"id": self._number, "body": body, "headers": dict(headers or {})}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return answer

    def wait_tokens(self, answer: Answer, count: int, timeout_s: float = WAIT_S) -> None:
        """Until `count` tokens of the answer are there; AssertionError if it ends before."""
        with self._changed:
            assert self._changed.wait_for(lambda: answer.over or len(answer.ids) >= count, timeout_s), (
                f"{len(answer.ids)} tokens in {timeout_s} s, not {count}")
        assert len(answer.ids) >= count, f"it ended after {len(answer.ids)} tokens: {answer.over}"

    def wait_over(self, answer: Answer, timeout_s: float = WAIT_S) -> dict[str, Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: answer.over is not None, timeout_s), (
                f"not over after {timeout_s} s: {len(answer.ids)} tokens")
        assert answer.over is not None
        return answer.over

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            with self._changed:
                answer = self._answers[event["id"]]
                if "ids" in event:
                    answer.ids += event["ids"]
                    answer.times += [event["at"]] * len(event["ids"])
                elif "comment" in event:
                    answer.comments.append(event["comment"])
                elif event.get("over"):
                    answer.over = event
                self._changed.notify_all()


class StruckHousehold:
    """Devices in a laboratory; the first one is read and runs the model, the others are struck."""

    def __init__(self, lab: Lab, root: Path, names: Sequence[str], memory: Sequence[int],
                 options: Sequence[str] = ()) -> None:
        self.lab, self.names, self.root = lab, tuple(names), root
        self.devices = [
            Device(root / name, name, memory=str(memory[host]), prefix=lab.argv(host, []), port=8643,
                   api="127.0.0.1:8642", options=options) for host, name in enumerate(names)
        ]
        self.listener: Listener

    def start(self) -> None:
        for device in self.devices:
            device.start()
        for device in self.devices:
            device.wait_ready()
        for joiner in self.devices[1:]:
            code = self.devices[0].cli("invite").stdout.split()[-1]
            joiner.cli("join", code)
        self.listener = Listener(self.lab, 0, self.devices[0])

    def stop(self) -> None:
        with contextlib.suppress(AttributeError):
            self.listener.close()
        for device in self.devices:
            device.stop()

    def deployment(self) -> dict[str, Any]:
        found: dict[str, Any] = self.devices[0].status()["deployments"][0]
        return found

    def holders(self) -> list[int]:
        """Hosts other than the source that hold a stage now."""
        stages = self.deployment()["plan"]["stages"]
        return sorted({self.names.index(stage["device"]) for stage in stages} - {0})

    def wait(self, what: str, condition: Any, timeout_s: float = WAIT_S) -> None:
        """Until `condition()` holds; looks again and again, since nothing tells a test of another process's state."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s: {self.devices[0].status()}"
            time.sleep(0.1)

    def online(self, host: int) -> bool:
        state = {one["name"]: one["state"] for one in self.devices[0].status()["devices"]}
        return state[self.names[host]] == "online"

    # ---- faults ---------------------------------------------------------------------------------------------------

    def pids(self, host: int) -> list[int]:
        """The daemon's process and its children, the daemon first."""
        process = self.devices[host].process
        assert process is not None
        return [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]

    def engine(self, host: int) -> int:
        """The pid of the device's engine process."""
        for pid in self.pids(host)[1:]:
            with contextlib.suppress(psutil.Error):
                if "peerllm.engine" in psutil.Process(pid).cmdline():
                    return pid
        raise AssertionError(f"{self.names[host]} runs no engine")

    def signal(self, host: int, what: int) -> None:
        for pid in self.pids(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def kill(self, host: int) -> None:
        self.signal(host, signal.SIGKILL)
        self.devices[host].process.wait(10)  # type: ignore[union-attr]

    def revive(self, host: int) -> None:
        """Start the device's daemon again and wait until the household sees it."""
        self.devices[host].start().wait_ready()
        self.wait(f"{self.names[host]} online", lambda: self.online(host))

    def revive_stopped(self, host: int) -> None:
        """Wait until the device has ended by itself, and start it again."""
        process = self.devices[host].process
        assert process is not None
        process.wait(WAIT_S)
        self.revive(host)

    @contextlib.contextmanager
    def frozen(self, host: int) -> Iterator[None]:
        self.signal(host, signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(host, signal.SIGCONT)

    @contextlib.contextmanager
    def unplugged(self, host: int) -> Iterator[None]:
        self.lab.set_link(host, up=False)
        try:
            yield
        finally:
            self.lab.set_link(host, up=True)


