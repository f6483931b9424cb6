"""Coordinators that are cut off from the others: two that serve the same model meet again, and one is left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import body
from tests.daemon.test_coordinator_loss import CONTEXT, SLOTS, memory
from tests.lab.netns import Lab
from tests.lab.struck_household import Listener, StruckHousehold, serving

FULL = bool(os.environ.get("PEERLLM_FULL"))
pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
MEMORY = 30_000_000  # each holds the built-in model alone, with half of the slots that both have together
TOKENS = 900
REQUEST: dict[str, Any] = body("Tell me a story about a fox.", TOKENS, stream=True, ignore_eos=True)
FIRST_TOKENS = 6
SETTLE_S = 60.0
FROZEN_S = 10.0
MOMENT_S = 5.0  # after four seconds others go on where they can
NAMES = ("laptop", "mini-pc", "jetson")
ANSWER_S = 10.0  # another device answers within this


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[StruckHousehold]:
    with Lab(2) as lab:
        household = StruckHousehold(lab, tmp_path, ("laptop", "mini-pc"), [MEMORY, MEMORY])
        try:
            household.start()
            household.devices[0].cli("run", "builtin", "--context", "1024")
            yield household
        finally:
            household.stop()


def test_two_that_were_cut_apart_and_both_serve_are_one_again(apart: StruckHousehold) -> None:
    _, second = apart.devices
    apart.wait("both in the plan", lambda: apart.holders() == [1])
    apart.wait("a follower", lambda: "can follow" in second.log_tail())
    undisturbed = apart.listener.ask(REQUEST)
    assert apart.listener.wait_over(undisturbed)["status"] == 200
    there = Listener(apart.lab, 1, second)
    try:
        kept = apart.listener.ask(REQUEST)
        apart.listener.wait_tokens(kept, FIRST_TOKENS)
        with apart.unplugged(1):
            apart.listener.wait_tokens(kept, len(kept.ids) + 20)

            def serving_anew() -> bool:
                return any(
                    one["state"] == "serving" and one["coordinator"] == "mini-pc"
                    for one in second.status()["deployments"]
                )

            apart.wait("a deployment of its own", serving_anew)
            here = apart.listener.ask(REQUEST)
            over = there.ask(REQUEST)
            apart.listener.wait_tokens(here, FIRST_TOKENS)
            there.wait_tokens(over, FIRST_TOKENS)
        for listener, answer in ((apart.listener, kept), (apart.listener, here), (there, over)):
            end = listener.wait_over(answer)
            assert (end["status"], end["error"]) == (200, ""), end
            assert answer.ids == undisturbed.ids

        def one_left() -> bool:
            told = [device.status()["deployments"] for device in apart.devices]
            return all([(one["state"], one["coordinator"]) for one in each] == [("serving", "laptop")] for each in told)

        apart.wait("one coordinator is left", one_left, SETTLE_S)
        time.sleep(1.0)
        again = there.ask(REQUEST)
        assert there.wait_over(again)["status"] == 200
        assert again.ids == undisturbed.ids
    finally:
        there.close()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[StruckHousehold]:
    """All three are needed, and the last two without the first."""
    with Lab(3) as lab:
        household = StruckHousehold(lab, tmp_path, NAMES, memory())
        try:
            household.start()
            household.devices[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
            yield household
        finally:
            for host in range(3):
                household.kill(host)  # a farewell would wait for those that cannot do without it
            household.stop()


@pytest.mark.parametrize("how", ["frozen", "unplugged"])
def test_a_coordinator_that_comes_back_finds_its_deployment_gone_on_with(three: StruckHousehold, how: str) -> None:
    _, second, third = three.devices
    three.wait("all in the plan", lambda: three.holders() == [1, 2])
    three.wait("followers", lambda: all("can follow" in device.log_tail() for device in (second, third)))
    (before,) = third.status()["deployments"]
    asked = body("Tell me a story about a fox.", 40, stream=True)
    longer = body("Tell me a story about a fox.", CONTEXT - 100, stream=True, ignore_eos=True)
    expected, whole = three.listener.ask(asked), three.listener.ask(longer)
    for answer in (expected, whole):
        assert three.listener.wait_over(answer)["status"] == 200
    there = Listener(three.lab, 2, third)
    try:
        local = three.listener.ask(longer)  # without a key, read on the coordinator itself
        three.listener.wait_tokens(local, FIRST_TOKENS)
        with three.frozen(0) if how == "frozen" else three.unplugged(0):
            lost = time.monotonic()
            again = there.ask(asked)
            end = there.wait_over(again)
            assert (end["status"], end["error"], again.ids) == (200, "", expected.ids), end
            took_s = time.monotonic() - lost
            assert took_s < ANSWER_S, f"answered after {took_s:.1f} s"
            time.sleep(max(0.0, FROZEN_S - took_s))
        three.wait("everyone online", lambda: three.online(1) and three.online(2))
        end = three.listener.wait_over(local)
        assert (end["status"], end["error"]) == (200, ""), end
        assert local.ids == whole.ids

        def one_left() -> bool:
            told = [device.status()["deployments"] for device in three.devices]
            return all(len(each) == 1 and each[0]["state"] == "serving" for each in told)

        three.wait("one coordinator", one_left, SETTLE_S)
        (after,) = three.devices[0].status()["deployments"]
        assert after["id"] == before["id"]
        assert after["coordinator"] in ("mini-pc", "jetson")
        for listener in (there, three.listener):
            last = listener.ask(asked)
            end = listener.wait_over(last)
            assert (end["status"], end["error"], last.ids) == (200, "", expected.ids), three.told()
    finally:
        there.close()


def test_a_coordinator_that_stands_still_is_waited_for_where_the_others_cannot_hold_the_model(tmp_path: Path) -> None:
    with serving(tmp_path, None, NAMES, holders=3) as house:

        def loaded() -> list[tuple[int, int]]:
            return [(house.engine(host), house.load(host)["loaded_layers"]) for host in range(3)]

        house.wait("followers", lambda: all("can follow" in device.log_tail() for device in house.devices[1:]))
        asked = body("Tell me a story about a fox.", 300, stream=True, ignore_eos=True)
        whole = house.listener.ask(asked)
        assert house.listener.wait_over(whole)["status"] == 200
        before, local = loaded(), house.listener.ask(asked)
        house.listener.wait_tokens(local, FIRST_TOKENS)
        with house.frozen(0):
            time.sleep(MOMENT_S)
        end = house.listener.wait_over(local)
        assert (end["status"], end["error"], local.ids) == (200, "", whole.ids), end
        house.settled()
        assert loaded() == before
        (told,) = house.devices[2].status()["deployments"]
        assert told["coordinator"] == "laptop"
