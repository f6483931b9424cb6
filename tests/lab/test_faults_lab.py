"""Devices are killed, frozen, unplugged and sent away in the middle of answers: every answer ends with the same tokens.

Three hosts on a bridge, any two of which can hold the built-in model. The one that is read is never struck, but its
engine is.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.clients import body
from tests.lab.netns import Lab
from tests.lab.struck_household import Answer, StruckHousehold

FULL = bool(os.environ.get("PEERLLM_FULL"))
pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600 if FULL else 900)]
NAMES = ("laptop", "mini-pc", "jetson")
SLOTS, CONTEXT = 2, 512
FAULTS = 100 if FULL else 12
KINDS = ("kill", "kill engine", "kill own engine", "freeze", "blip", "unplug", "farewell")
SEED = int(os.environ.get("PEERLLM_SEED", "7"))
FIRST_TOKENS = 6  # a fault strikes when a stream is past its fifth token
REQUESTS: tuple[dict[str, Any], ...] = (
    body("Tell me a story about a fox.", 400, stream=True),
    body("Tell me a story.", 400, stream=True, temperature=0.9, seed=3, frequency_penalty=0.4, presence_penalty=0.2),
)


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StruckHousehold]:
    sizes = limits(sizes_of(MODEL_DIR, SLOTS, CONTEXT), 2)
    with Lab(len(NAMES)) as lab:
        household = StruckHousehold(lab, tmp_path_factory.mktemp("struck"), NAMES, [sizes[0], max(sizes), max(sizes)])
        try:
            household.start()
            household.devices[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
            yield household
        finally:
            household.stop()


@pytest.fixture(scope="module")
def undisturbed(struck: StruckHousehold) -> list[list[int]]:
    answers = [struck.listener.ask(request) for request in REQUESTS]
    for answer in answers:
        assert struck.listener.wait_over(answer)["finish"], answer.over
    assert all(len(answer.ids) > 100 for answer in answers)
    return [answer.ids for answer in answers]


def begin(struck: StruckHousehold) -> list[Answer]:
    answers = [struck.listener.ask(request) for request in REQUESTS]
    for answer in answers:
        struck.listener.wait_tokens(answer, FIRST_TOKENS)
    return answers


def check(struck: StruckHousehold, answers: list[Answer], undisturbed: list[list[int]], what: str) -> None:
    for answer, expected in zip(answers, undisturbed, strict=True):
        over = struck.listener.wait_over(answer)
        assert over["status"] == 200, f"{what}: {over}"
        assert not over["error"], f"{what}: {over}"
        assert answer.ids == expected, f"{what}: other tokens from {_first_difference(answer.ids, expected)}"
        assert over["finish"], f"{what}: it ended early"


def _first_difference(some: list[int], others: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(some, others, strict=False)) if pair[0] != pair[1]), len(some))


def strike(struck: StruckHousehold, kind: str, host: int) -> None:
    """Do it, and bring the device back where it went away."""
    match kind:
        case "kill":
            struck.kill(host)
        case "kill engine":
            psutil.Process(struck.engine(host)).kill()
        case "kill own engine":
            psutil.Process(struck.engine(0)).kill()
        case "freeze" | "blip":
            with struck.frozen(host):
                time.sleep(5.0 if kind == "freeze" else 0.7)
        case "unplug":
            with struck.unplugged(host):
                time.sleep(4.0)
        case "farewell":
            assert struck.devices[host].stop() == 0


@pytest.mark.parametrize("number", range(FAULTS))
def test_an_answer_survives(struck: StruckHousehold, undisturbed: list[list[int]], number: int) -> None:
    dice = random.Random(SEED + number)
    kind = KINDS[number % len(KINDS)]
    struck.wait("a second device in the plan", struck.holders)
    host = dice.choice(struck.holders())
    answers = begin(struck)
    strike(struck, kind, host)
    check(struck, answers, undisturbed, f"{kind} of {NAMES[host]}, seed {SEED + number}")
    if kind in ("kill", "farewell"):
        struck.revive(host)
    struck.wait("everyone online", lambda: all(struck.online(each) for each in range(1, len(NAMES))))
    struck.wait("serving", lambda: struck.deployment()["state"] == "serving")


def test_nothing_is_left_behind(struck: StruckHousehold) -> None:
    """No zombie process, and no slot or sequence on any engine."""
    for host in range(len(NAMES)):
        children = [psutil.Process(pid) for pid in struck.pids(host)]
        assert not [child for child in children if child.status() == psutil.STATUS_ZOMBIE]
