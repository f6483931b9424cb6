"""Three devices of which all are needed: what happens when one of them is away, and when it comes back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.clients import PATH, body
from tests.lab.struck_answers import StruckAnswers, requests
from tests.lab.struck_household import StruckHousehold, serving

FULL = bool(os.environ.get("PEERLLM_FULL"))
pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
NAMES = ("laptop", "mini-pc", "jetson")
AWAY = 2
FREEZES = 10 if FULL else 1
FROZEN_S = 5.0
MOST_WAIT_S = 45.0  # a request for a model whose devices are away is refused after 30 s


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StruckHousehold]:
    with serving(tmp_path_factory.mktemp("waiting"), None, NAMES, holders=3) as household:
        assert set(household.stages()) == set(NAMES)
        yield household


@pytest.fixture(scope="module")
def answers(house: StruckHousehold) -> StruckAnswers:
    return StruckAnswers(house, requests(200))


def loaded(house: StruckHousehold) -> list[tuple[int, int]]:
    """By device: its engine, and how many layers that has loaded since it started."""
    return [(house.engine(host), house.load(host)["loaded_layers"]) for host in range(len(NAMES))]


@pytest.mark.parametrize("number", range(FREEZES))
def test_an_answer_goes_on_after_a_freeze_and_nothing_is_loaded_again(
    house: StruckHousehold, answers: StruckAnswers, number: int
) -> None:
    host = 1 + number % 2
    before = loaded(house)
    begun = answers.begin()
    with house.frozen(host):
        time.sleep(FROZEN_S)
        assert all(answer.over is None for answer in begun), "they wait"
    answers.check(begun, f"{NAMES[host]} frozen")
    house.settled()
    assert loaded(house) == before, "links may have been made anew, but nothing is loaded"


def refused_in_time(house: StruckHousehold) -> None:
    """A request waits, and is refused with what is missing."""
    asked = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        queued = thread.submit(house.get, 0, PATH, body("Hello!", 4))
        status, headers, refused = queued.result(MOST_WAIT_S)
    assert time.monotonic() - asked > 5.0, "it waited for the device, within bounds"
    assert (status, refused["error"]["status"]) == (503, 503), refused
    assert refused["error"]["missing_bytes"] > 0, refused
    assert int(headers["Retry-After"]) > 0


def test_too_little_memory_is_said_and_service_resumes(house: StruckHousehold, answers: StruckAnswers) -> None:
    begun = answers.begin()
    house.kill(AWAY)
    house.wait("it waits", lambda: house.deployment()["state"] == "waiting")
    house.wait("and says for how much", lambda: "missing" in house.deployment()["reason"])
    if FULL:
        refused_in_time(house)
    assert all(answer.over is None for answer in begun), "running answers wait on"
    waiting = house.listener.ask(body("Hello!", 8, stream=True))
    revived = threading.Thread(target=house.revive, args=(AWAY,))
    revived.start()
    assert house.listener.wait_over(waiting)["finish"], waiting.over
    answers.check(begun, "a device was away")
    revived.join()
    house.settled()
    answers.check(answers.begin(), "after its return")
