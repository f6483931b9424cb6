"""A sentence survives what happens to the devices that write it: the same tokens as undisturbed, and no error.

Real daemons, each with its engine process, and the built-in model in float32; the fault strikes past the tenth token.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.household import Device, household

SLOTS, CONTEXT = 2, 256
TOKENS = 96
STRIKE_AT = 10  # tokens
NAMES = ("laptop", "mini-pc", "jetson")
ANSWER_S = 60.0
SEEDED = {"temperature": 0.9, "seed": 7, "frequency_penalty": 0.3}


class Answer:
    """One streamed answer of the source, read by a thread of its own."""

    def __init__(self, device: Device, sampling: dict[str, Any] | None = None) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self.error = self.finish = ""
        self.comments: list[str] = []
        self._grew = threading.Condition()
        body = {
            "model": "builtin",
            "max_tokens": TOKENS,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
            "messages": [{"role": "user", "content": "Tell me a long story about a lighthouse."}],
            **(sampling or {"temperature": 0}),
        }
        self._open = partial(device.open, "/v1/chat/completions", json.dumps(body).encode(), ANSWER_S)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._open() as response:
            for line in response:
                if line.startswith(b": "):
                    self.comments.append(line[2:].decode().strip())
                if not line.startswith(b"data: {"):
                    continue
                told = json.loads(line[6:])
                choice = told["choices"][0] if "choices" in told else {}
                with self._grew:
                    self.ids += choice.get("token_ids") or []
                    self.times.append(time.monotonic())
                    self.error = str(told.get("error", ""))
                    self.finish = choice.get("finish_reason") or self.finish
                    self._grew.notify_all()

    def reached(self, tokens: int) -> None:
        with self._grew:
            assert self._grew.wait_for(lambda: len(self.ids) >= tokens, ANSWER_S), self.error

    def whole(self) -> list[int]:
        """All its ids, once it has ended without an error."""
        self._thread.join(ANSWER_S)
        assert not self._thread.is_alive()
        assert (self.error, self.finish) == ("", "length")
        return self.ids

    @property
    def pause_s(self) -> float:
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


def engine_of(device: Device) -> int:
    assert device.process is not None
    children = psutil.Process(device.process.pid).children()
    (engine,) = (child.pid for child in children if "peerllm.engine" in child.cmdline())
    return engine


def deployment(device: Device) -> dict[str, Any]:
    return device.status()["deployments"][0]


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Device]]:
    """The source, which holds a third, and two of which each can hold the rest alone."""
    sizes = sizes_of(MODEL_DIR, SLOTS, CONTEXT)
    first, *_ = limits(sizes, 3)
    rest = sizes.total - sum(sizes.blocks[:3]) - sizes.head
    memory = dict(zip(NAMES, map(str, (first, rest, rest)), strict=True))
    directory = tmp_path_factory.mktemp("answers")
    with household(directory, NAMES, memory=memory) as started:
        started[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
        yield {device.name: device for device in started}


@pytest.fixture(scope="module")
def undisturbed(devices: dict[str, Device]) -> dict[str, list[int]]:
    source = devices["laptop"]
    found = {"greedy": Answer(source).whole(), "seeded": Answer(source, SEEDED).whole()}
    assert len(set(found["greedy"])) > 10 and found["greedy"] != found["seeded"]
    return found


def holder(devices: dict[str, Device]) -> Device:
    """A device other than the source that holds a stage."""
    stages = deployment(devices["laptop"])["plan"]["stages"]
    return next(devices[stage["device"]] for stage in stages if stage["device"] != "laptop")


def struck(devices: dict[str, Device], undisturbed: dict[str, list[int]], strike: Callable[[], None]) -> float:
    """Two answers go on side by side through what `strike` does; the longer pause in seconds."""
    answers = {"greedy": Answer(devices["laptop"]), "seeded": Answer(devices["laptop"], SEEDED)}
    for answer in answers.values():
        answer.reached(STRIKE_AT)
    strike()
    assert {kind: answer.whole() for kind, answer in answers.items()} == undisturbed
    return max(answer.pause_s for answer in answers.values())


def test_the_sources_engine_is_killed(devices: dict[str, Device], undisturbed: dict[str, list[int]]) -> None:
    struck(devices, undisturbed, lambda: os.kill(engine_of(devices["laptop"]), signal.SIGKILL))


@pytest.mark.slow
def test_another_devices_engine_is_killed(devices: dict[str, Device], undisturbed: dict[str, list[int]]) -> None:
    struck(devices, undisturbed, lambda: os.kill(engine_of(holder(devices)), signal.SIGKILL))


@pytest.mark.slow
def test_a_device_is_frozen_for_a_while(devices: dict[str, Device], undisturbed: dict[str, list[int]]) -> None:
    def strike() -> None:
        frozen = holder(devices)
        assert frozen.process is not None
        pids = [frozen.process.pid, engine_of(frozen)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        threading.Timer(5.0, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids]).start()

    assert struck(devices, undisturbed, strike) < 4.5, "it went on without the frozen device"


def test_a_device_is_killed_and_another_takes_its_layers(
    devices: dict[str, Device], undisturbed: dict[str, list[int]]
) -> None:
    killed = holder(devices)
    struck(devices, undisturbed, killed.kill)
    assert killed.name not in {stage["device"] for stage in deployment(devices["laptop"])["plan"]["stages"]}


@pytest.mark.slow
def test_what_nobody_else_can_hold_waits_for_its_device_and_nothing_is_loaded_again(tmp_path: Path) -> None:
    sizes = sizes_of(MODEL_DIR, SLOTS, CONTEXT)
    memory = dict(zip(NAMES[:2], map(str, limits(sizes, 2)), strict=True))
    with household(tmp_path, NAMES[:2], memory=memory) as (laptop, mini):
        laptop.cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
        devices = {"laptop": laptop, "mini-pc": mini}
        undisturbed = {"greedy": Answer(laptop).whole(), "seeded": Answer(laptop, SEEDED).whole()}
        epoch = deployment(laptop)["epoch"]

        def freeze() -> None:
            assert mini.process is not None
            pids = [mini.process.pid, engine_of(mini)]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            threading.Timer(5.0, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids]).start()

        assert struck(devices, undisturbed, freeze) < 8.0
        assert deployment(laptop)["epoch"] == epoch, "the same shards, the same links"

        def reboot() -> None:
            mini.kill()
            mini.start().wait_ready()

        struck(devices, undisturbed, reboot)
        assert deployment(laptop)["epoch"] > epoch
