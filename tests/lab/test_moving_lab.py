"""Devices that come, and devices that slow down: the plan moves where that helps, and no token changes meanwhile.

The laptop can hold a half, each other device the other half. It begins with a slow one; a fast one comes, then one
that is of no use; then the fast one becomes slow.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import psutil
import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.lab.cgroups import ProcessorGroup, why_no_processor_groups
from tests.lab.netns import Lab
from tests.lab.struck_answers import StruckAnswers, requests
from tests.lab.struck_household import StruckHousehold

FULL = bool(os.environ.get("PEERLLM_FULL"))
pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(1800 if FULL else 600),
    pytest.mark.skipif(bool(why_no_processor_groups()), reason=why_no_processor_groups()),
]
NAMES = ("laptop", "old-pc", "jetson", "watch")
OLD, FAST, WATCH = 1, 2, 3
SLOTS, CONTEXT = 2, 512
SLOW = 0.1  # of a processor
SLOWED = 3 if FULL else 6  # times as long for what is computed; on a busy machine a third is hard to tell from noise
JOIN_S, RELIEF_S = (10.0, 20.0) if FULL else (40.0, 60.0)  # in CI others use the same processors
NOISE_S = 600.0 if FULL else 20.0
LOOK_S = 5.0  # in which a device's use of the processor is measured
SEED = int(os.environ.get("PEERLLM_SEED", "7"))


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, ProcessorGroup]]:
    made = {host: ProcessorGroup() for host in (OLD, FAST, WATCH)}
    try:
        yield made
    finally:
        for group in made.values():
            group.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, groups: dict[int, ProcessorGroup]) -> Iterator[StruckHousehold]:
    sizes = limits(sizes_of(MODEL_DIR, SLOTS, CONTEXT), 2)
    with Lab(len(NAMES)) as lab:
        memory = [sizes[0], *[max(sizes)] * (len(NAMES) - 1)]
        household = StruckHousehold(lab, tmp_path_factory.mktemp("moving"), NAMES, memory)
        try:
            household.start((0, OLD))
            groups[OLD].add(household.pids(OLD))
            groups[OLD].limit(SLOW)
            household.devices[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
            assert set(household.stages()) == {"laptop", "old-pc"}
            yield household
        finally:
            for group in groups.values():
                group.limit(None)
            household.stop()


@pytest.fixture(scope="module")
def answers(house: StruckHousehold) -> StruckAnswers:
    return StruckAnswers(house, requests(120), least=60)


def join(house: StruckHousehold, host: int) -> float:
    """The moment at which it has joined."""
    house.devices[host].start().wait_ready()
    house.join(house.devices[host])
    return time.monotonic()


def moved_to(house: StruckHousehold, device: str) -> bool:
    deployment = house.deployment()
    return deployment["state"] == "serving" and device in house.stages()


def test_a_device_that_helps_is_used_soon(house: StruckHousehold, answers: StruckAnswers) -> None:
    with answers.streaming():
        joined = join(house, FAST)
        house.wait("jetson in the plan", lambda: moved_to(house, "jetson"), JOIN_S)
        print(f"used {time.monotonic() - joined:.1f} s after it joined")
    assert "old-pc" not in house.stages()


def test_one_that_does_not_help_is_declined(
    house: StruckHousehold, answers: StruckAnswers, groups: dict[int, ProcessorGroup]
) -> None:
    epoch = house.deployment()["epoch"]
    house.devices[WATCH].start().wait_ready()
    groups[WATCH].add(house.pids(WATCH))
    groups[WATCH].limit(SLOW)
    with answers.streaming():
        house.join(house.devices[WATCH])
        house.wait("a reason to stay", lambda: house.deployment()["reason"].startswith("stay: "), 2 * JOIN_S)
    assert (house.deployment()["epoch"], "watch" in house.stages()) == (epoch, False)


def test_a_device_that_slows_down_is_relieved(
    house: StruckHousehold, answers: StruckAnswers, groups: dict[int, ProcessorGroup]
) -> None:
    groups[OLD].limit(None)
    groups[FAST].add(house.pids(FAST))
    with answers.streaming():
        used = share(house.engine(FAST))
        groups[FAST].limit(used / (1 + (SLOWED - 1) * used))  # what it takes the same passes with, so much slower
        slowed = time.monotonic()
        house.wait("the plan without jetson", lambda: "jetson" not in house.stages(), RELIEF_S)
        print(f"relieved {time.monotonic() - slowed:.1f} s after it slowed down")
    groups[FAST].limit(None)
    house.settled()


def test_noise_moves_nothing(house: StruckHousehold, answers: StruckAnswers, groups: dict[int, ProcessorGroup]) -> None:
    """At most two moves in ten minutes."""
    dice, begun, plans = random.Random(SEED), time.monotonic(), [house.stages()]
    with answers.streaming():
        while time.monotonic() < begun + NOISE_S:
            for host in (OLD, FAST):
                groups[host].limit(dice.choice((None, 0.5, 0.1, 0.05)))
            time.sleep(dice.uniform(0.5, 4.0))
            if house.deployment()["state"] == "serving" and (plan := house.stages()) != plans[-1]:
                plans.append(plan)
    for host in (OLD, FAST):
        groups[host].limit(None)
    assert len(plans) <= 1 + 2, plans


def share(pid: int) -> float:
    """Of one processor, that a process uses now."""
    return float(psutil.Process(pid).cpu_percent(LOOK_S)) / 100
