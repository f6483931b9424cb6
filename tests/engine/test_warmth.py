"""When dry passes are made: shortly before a step is due, never for long, and not on a battery."""

from __future__ import annotations

import asyncio
import math

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerllm.engine import power
from peerllm.engine.warmth import DEVIATION_S, LATE_S, LEAD_S, Warmth


def never() -> bool:
    return False


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Stage:
    def __init__(self, answer: bool | Exception = True) -> None:
        self.answer, self.rehearsed = answer, 0

    def rehearse(self, stop) -> bool:
        self.rehearsed += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def turns(warmth: Warmth, clock: Clock, wait_s: float, *stages: Stage, rounds: int = 30) -> None:
    """Steps of the stages in turn, each after a wait."""
    for _ in range(rounds):
        for one in stages:
            clock.now += wait_s
            warmth.begins(one, steps=True)
            clock.now += 0.02
            warmth.ended(one, steps=True)


def test_it_sleeps_until_shortly_before_the_next_step_is_due():
    clock, one = Clock(), Stage()
    warmth = Warmth(True, clock)
    assert warmth.pause_s() == math.inf
    turns(warmth, clock, 0.1, one, rounds=80)
    assert warmth.pause_s() == pytest.approx(0.1 - LEAD_S, abs=1e-3)
    clock.now += 0.097
    assert warmth.pause_s() == 0
    warmth.rehearse(never)
    clock.now += 0.003 + LATE_S / 2
    assert warmth.pause_s() == 0, "it is late"
    clock.now += LATE_S
    assert warmth.pause_s() == math.inf, "nothing comes any more"
    warmth.begins(one, steps=False)
    warmth.ended(one, steps=False)
    assert warmth.pause_s() == math.inf, "after a prompt nobody knows what comes"


def test_a_device_that_need_not_wait_does_nothing_after_its_answer():
    clock, one = Clock(), Stage()
    warmth = Warmth(True, clock)
    turns(warmth, clock, 0.0001, one)
    assert warmth.pause_s() == math.inf


def test_what_comes_next_is_rehearsed():
    clock, source, head = Clock(), Stage(), Stage()
    warmth = Warmth(True, clock)
    turns(warmth, clock, 0.01, source, head)
    warmth.rehearse(never)
    assert (source.rehearsed, head.rehearsed) == (1, 0), "the head was the last"
    warmth.forget(source)
    assert warmth.pause_s() == math.inf
    warmth.ended(head, steps=True)
    warmth.rehearse(never)
    assert source.rehearsed == 1, "it is unloaded"


@pytest.mark.parametrize("answer", [False, ValueError("on purpose")])
def test_a_stage_that_cannot_is_left_in_peace(answer, capsys):
    clock, one = Clock(), Stage(answer)
    warmth = Warmth(True, clock)
    warmth.ended(one, steps=True)
    assert warmth.pause_s() == 0
    warmth.rehearse(never)
    assert warmth.pause_s() == math.inf and one.rehearsed == 1
    turns(warmth, clock, 0.01, one)
    warmth.rehearse(never)
    assert one.rehearsed == (1 if isinstance(answer, Exception) else 2), "once is enough"
    assert ("on purpose" in capsys.readouterr().err) == isinstance(answer, Exception)


def test_nothing_is_rehearsed_where_it_is_not_wanted():
    clock, one = Clock(), Stage()
    warmth = Warmth(False, clock)
    turns(warmth, clock, 0.1, one)
    assert warmth.pause_s() == math.inf
    warmth.rehearse(never)
    assert not one.rehearsed


def test_who_cannot_does_not_stand_in_the_way_of_who_can():
    clock, cannot, can = Clock(), Stage(False), Stage()
    warmth = Warmth(True, clock)
    for _ in range(3):
        for one in (cannot, can):
            clock.now += 0.02
            warmth.begins(one, steps=True)
            warmth.ended(one, steps=True)
            warmth.rehearse(never)
    assert can.rehearsed == 3, "once before anything was known of what comes next"


def test_a_pause_between_answers_is_not_taken_for_a_wait():
    clock, one = Clock(), Stage()
    warmth = Warmth(True, clock)
    for _ in range(20):
        turns(warmth, clock, 0.02, one, rounds=3)
        clock.now += 8
    assert busy(warmth, clock) < 2 * (LEAD_S + 2 * DEVIATION_S + LATE_S)
    turns(warmth, clock, 0.02, one)
    assert busy(warmth, clock) < 2 * LEAD_S + LATE_S


@given(st.lists(st.floats(0, 100), max_size=40))
def test_whatever_came_before_a_wait_keeps_the_processor_busy_for_a_moment_only(waits):
    clock, one = Clock(), Stage()
    warmth = Warmth(True, clock)
    for wait_s in waits:
        turns(warmth, clock, wait_s, one, rounds=1)
    warmth.ended(one, steps=True)
    assert busy(warmth, clock) <= LEAD_S + 2 * DEVIATION_S + LATE_S + 0.002


def busy(warmth: Warmth, clock: Clock) -> float:
    """Seconds of the wait that has begun in which it rehearses, if nothing comes."""
    total = 0.0
    while (pause_s := warmth.pause_s()) != math.inf:
        clock.now += max(pause_s, 0.001)
        total += 0.001 if not pause_s else 0
    return total


async def test_the_battery_decides(monkeypatch):
    class Battery:
        power_plugged: bool | None = False

    found: list[bool] = []
    monkeypatch.setattr(power, "LOOK_S", 0.0)
    monkeypatch.setattr(psutil, "sensors_battery", Battery, raising=False)
    told = asyncio.Event()

    def tell(mains: bool) -> None:
        found.append(mains)
        Battery.power_plugged = True
        if mains:
            told.set()

    watching = asyncio.create_task(power.watch(tell))
    async with asyncio.timeout(30):
        await told.wait()
    watching.cancel()
    assert found[:2] == [False, True]
    for plugged, mains in ((None, True), (True, True), (False, False)):
        Battery.power_plugged = plugged
        assert power.on_mains() is mains

    def unknown():
        raise OSError

    monkeypatch.setattr(psutil, "sensors_battery", unknown)
    assert power.on_mains()
    monkeypatch.delattr(psutil, "sensors_battery")
    assert power.on_mains(), "some systems have no such function"
