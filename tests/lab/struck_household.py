"""A household in namespaces whose devices are killed, frozen, unplugged and brought back while answers are streamed."""

from __future__ import annotations

import contextlib
import http.client
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

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import limits, sizes_of
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
                f"{len(answer.ids)} tokens in {timeout_s} s, not {count}"
            )
        assert len(answer.ids) >= count, f"it ended after {len(answer.ids)} tokens: {answer.over}"

    def wait_over(self, answer: Answer, timeout_s: float = WAIT_S) -> dict[str, Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: answer.over is not None, timeout_s), (
                f"not over after {timeout_s} s: {len(answer.ids)} tokens"
            )
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

    def __init__(
        self,
        lab: Lab,
        root: Path,
        names: Sequence[str],
        memory: Sequence[int],
        prefixes: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        """`prefixes`: what a host's daemon is started by."""
        self.lab, self.names, self.root = lab, tuple(names), root
        self.devices = [
            Device(
                root / name,
                name,
                memory=str(memory[host]),
                prefix=lab.argv(host, (prefixes or {}).get(host, ())),
                port=8643,
                api="127.0.0.1:8642",
            )
            for host, name in enumerate(names)
        ]
        self.listener: Listener

    def start(self, hosts: Sequence[int] | None = None) -> None:
        """The household of these devices, the first one among them."""
        devices = [self.devices[host] for host in hosts or range(len(self.devices))]
        for device in devices:
            device.start()
        for device in devices:
            device.wait_ready()
        for joiner in devices[1:]:
            self.join(joiner)
        self.listener = Listener(self.lab, 0, self.devices[0])

    def join(self, joiner: Device) -> None:
        joiner.cli("join", self.devices[0].cli("invite").stdout.split()[-1])

    def get(self, host: int, path: str, body: Any = None) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and JSON of what a device's API answers; a POST if there is a body."""

        def ask() -> tuple[int, Mapping[str, str], Any]:
            connection = http.client.HTTPConnection("127.0.0.1", 8642, timeout=WAIT_S)
            headers = {"Authorization": f"Bearer {self.devices[host].token()}", "Content-Type": "application/json"}
            with contextlib.closing(connection):
                connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers)
                response = connection.getresponse()
                return response.status, dict(response.headers), json.loads(response.read())

        return self.lab.within(host, ask)

    def status(self, host: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.get(host, "/peerllm/v1/status")[2]
        return found

    def load(self, host: int) -> dict[str, Any]:
        """What the device's engine holds and has counted."""
        found: dict[str, Any] = self.get(host, "/peerllm/v1/engine")[2]
        return found

    def stop(self) -> None:
        with contextlib.suppress(AttributeError):
            self.listener.close()
        for device in self.devices:
            device.stop()

    def deployment(self) -> dict[str, Any]:
        found: dict[str, Any] = self.status()["deployments"][0]
        return found

    def told(self) -> str:
        """For a test that fails: what the source says of the model, and the ends of all logs."""
        logs = (f"{device.name}:\n{device.log_tail()}" for device in self.devices if device.data_dir.exists())
        return "\n".join([f"{self.deployment()}", *logs])

    def stages(self) -> list[str]:
        """The devices of the plan, in its order."""
        return [stage["device"] for stage in self.deployment()["plan"]["stages"]]

    def holders(self) -> list[int]:
        """Hosts other than the source that hold a stage now."""
        return sorted({self.names.index(device) for device in self.stages()} - {0})

    def wait(self, what: str, condition: Any, timeout_s: float = WAIT_S) -> None:
        """Until `condition()` holds; looks again and again, since nothing tells a test of another process's state."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s: {self.told()}"
            time.sleep(0.1)

    def online(self, host: int) -> bool:
        state = {one["name"]: one["state"] for one in self.status()["devices"]}
        return state[self.names[host]] == "online"

    def settled(self) -> None:
        """Wait until everyone is there and the model serves."""
        self.wait("everyone online", lambda: all(self.online(host) for host in range(1, len(self.names))))
        self.wait("serving with another device", lambda: self.deployment()["state"] == "serving" and self.holders())

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


@contextlib.contextmanager
def serving(
    root: Path,
    model: Path | None,
    names: Sequence[str],
    holders: int,
    slots: int = 2,
    context: int = 512,
    exact: bool = False,
    spare: int = 0,
    prefixes: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[StruckHousehold]:
    """A household that serves a model, the built-in one by default, and takes so many devices to hold it.

    The first one lends what makes it the source and nothing more; any of the others can hold the largest part
    and lends `spare` bytes besides, for other models.
    """
    form = {"dtype": "float32", "quantize": "none"} if exact else {}
    sizes = limits(sizes_of(model or MODEL_DIR, slots, context, **form), holders)
    memory = [sizes[0], *[max(sizes) + spare] * (len(names) - 1)]
    with Lab(len(names)) as lab:
        household = StruckHousehold(lab, root, names, memory, prefixes)
        try:
            household.start()
            size = ("--slots", str(slots), "--context", str(context))
            household.devices[0].cli("run", str(model or "builtin"), *size, *(["--exact"] if exact else []))
            yield household
        finally:
            household.stop()
