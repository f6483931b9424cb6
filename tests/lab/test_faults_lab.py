"""Devices are killed, frozen, unplugged and sent away in the middle of answers: every answer ends with the same tokens.

Three hosts on a bridge, any two of which can hold the built-in model. The one that is read is never struck, but its
engine is. At the end nothing is left of it all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import sizes_of
from tests.lab.leftovers import Leftovers, leftovers
from tests.lab.struck_answers import StruckAnswers, requests
from tests.lab.struck_household import StruckHousehold, serving

FULL = bool(os.environ.get("PEERLLM_FULL"))
pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600 if FULL else 900)]
NAMES = ("laptop", "mini-pc", "jetson")
SLOTS, CONTEXT = 2, 512
FAULTS = 100 if FULL else 12
KINDS = ("kill", "kill engine", "kill own engine", "freeze", "blip", "unplug", "farewell")
SEED = int(os.environ.get("PEERLLM_SEED", "7"))


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StruckHousehold]:
    with serving(tmp_path_factory.mktemp("struck"), None, NAMES, 2, SLOTS, CONTEXT) as household:
        yield household


@dataclass
class Story:
    answers: StruckAnswers
    before: Leftovers
    told: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(struck: StruckHousehold) -> Story:
    answers = StruckAnswers(struck, requests(400))
    return Story(answers, leftovers(struck, 0))


@pytest.mark.parametrize("number", range(FAULTS))
def test_an_answer_survives(struck: StruckHousehold, story: Story, number: int) -> None:
    dice = random.Random(SEED + number)
    kind = KINDS[number % len(KINDS)]
    struck.wait("a second device in the plan", struck.holders)
    host = dice.choice(struck.holders())
    story.told.append(f"{kind} of {NAMES[host]}")
    story.answers.survive(kind, host, f"{kind} of {NAMES[host]}, seed {SEED + number}")


def test_what_was_lost_was_computed_again(story: Story) -> None:
    assert story.answers.moved > len(story.told), "each loss of a stage costs some tokens"


def test_nothing_is_left_behind(struck: StruckHousehold, story: Story) -> None:
    """No zombie process, slot, sequence, link, task, reservation or memory."""
    struck.settled()
    for host in range(len(NAMES)):
        assert not [pid for pid in struck.pids(host) if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE]
        struck.wait("what is not needed is released", lambda host=host: kept(struck, host))
        now = leftovers(struck, host)
        assert now.slots == 0, now
        assert now.stages == struck.stages().count(NAMES[host]), now
    now = leftovers(struck, 0)  # the daemon that lived through it all
    assert now.tasks <= story.before.tasks + 4, (story.before, now)
    assert now.files <= story.before.files + 8, (story.before, now)
    assert now.threads <= story.before.threads + 2, (story.before, now)
    assert now.memory_bytes <= story.before.memory_bytes + (32 << 20), (story.before, now)


def kept(struck: StruckHousehold, host: int) -> bool:
    """Whether no more is promised than the plan and its passes take."""
    now, working = leftovers(struck, host), sizes_of(MODEL_DIR, SLOTS, CONTEXT).working
    return now.promised_bytes <= (now.planned_bytes + working if now.planned_bytes else 0)


def test_nothing_is_left_of_a_model_that_was_stopped(struck: StruckHousehold, story: Story) -> None:
    struck.devices[0].cli("stop", "builtin")
    for host in range(len(NAMES)):
        struck.wait("no promise is left", lambda host=host: leftovers(struck, host).promised_bytes == 0)
        now = leftovers(struck, host)
        assert (now.slots, now.stages, now.engine_bytes) == (0, 0, 0), now
