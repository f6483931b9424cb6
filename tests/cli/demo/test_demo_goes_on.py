"""The demo as a stranger tries it: one device is killed while a sentence is written, and the sentence goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peerllm.cli.demo.demo import FEWER_SLOTS, NAMES, SLOTS
from peerllm.cli.device import LocalDevice
from tests.cli.demo.test_demo import END_S, demo
from tests.e2e.test_answers_go_on import SEEDED, STRIKE_AT, Answer
from tests.household import Device

pytestmark = [pytest.mark.lab, pytest.mark.slow]
BACK_S = 120.0  # seconds until a device that was started again has layers, on a busy machine


def until(laptop: LocalDevice, serves: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The deployment, once it is as that says."""
    deadline, path = time.monotonic() + BACK_S, "/peerllm/v1/status"
    while not serves(deployment := laptop.get(path)["deployments"][0]):
        assert time.monotonic() < deadline, deployment
        path = "/peerllm/v1/status?wait=1"
    return deployment


def holders(deployment: dict[str, Any]) -> set[str]:
    return {stage["device"] for stage in deployment["plan"]["stages"]}


def test_a_device_is_killed_while_a_sentence_is_written_and_comes_back(tmp_path: Path) -> None:
    with demo(tmp_path, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdin is not None
            found: dict[str, Any] = json.loads(process.stdout.readline())
            laptop, mini, _ = found["devices"]
            read = Device(Path(laptop["data"]), laptop["name"])
            read.url = found["url"]
            asked = LocalDevice(Path(laptop["data"]))
            first = until(asked, lambda one: one["state"] == "serving")
            assert (holders(first), first["slots"]) == (set(NAMES[:3]), SLOTS), "all three take part"
            undisturbed = [Answer(read, how).whole() for how in (None, SEEDED)]

            answers = [Answer(read, how) for how in (None, SEEDED)]
            for answer in answers:
                answer.reached(STRIKE_AT)
            os.kill(mini["pid"], signal.SIGKILL)
            assert [answer.whole() for answer in answers] == undisturbed
            told = [words for answer in answers for words in answer.comments if words != "working"]
            assert all("mini-pc" in words for words in told)
            assert told or max(answer.pause_s for answer in answers) < 1.5, "a longer pause is explained"
            after = until(asked, lambda one: one["state"] == "serving" and not one["message"])
            assert (holders(after), after["slots"]) == ({"laptop", "jetson"}, FEWER_SLOTS)

            answers = [Answer(read, how) for how in (None, SEEDED)]
            answers[0].reached(STRIKE_AT)
            process.stdin.write("\n")
            process.stdin.flush()
            until(asked, lambda one: holders(one) == set(NAMES[:3]) and one["state"] == "serving")
            assert [answer.whole() for answer in answers] == undisturbed
            assert Answer(read).whole() == undisturbed[0]
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(END_S) == 0
