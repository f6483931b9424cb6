"""A device or link that changed for good is told once; noise, idleness and constant errors are not."""

from __future__ import annotations

import random

import pytest

from peerllm.daemon.deployment.planning.conditions_watch import AGREEING, FIRST, ConditionsWatch
from peerllm.types import LinkProfile, Plan, Prediction, Stage

A, B = "a" * 64, "b" * 64
PLAN = Plan((Stage(A, 0, 2), Stage(B, 3, 5), Stage(A, 6, 6)), Prediction(1, 1, 1, 1))


def paces(a, b, head=1.0):
    return {0: ((1, a),), 1: ((1, b), (2, b * 1.5)), 2: ((1, head),)}


def looked(watch, *looks):
    return [watch.devices(look) for look in looks]


def test_a_device_slowed_to_a_third_is_told_after_as_many_looks_as_must_agree_and_then_no_more():
    watch = ConditionsWatch(PLAN)
    assert not any(looked(watch, *(paces(10 + i / 10, 20 + i / 10) for i in range(FIRST + 2))))
    slow = [paces(10 + i / 10, 60 + i) for i in range(AGREEING)]
    *before, told = looked(watch, *slow)
    assert not any(before) and told.keys() == {B} and told[B] == pytest.approx(3.0, rel=0.05)
    assert not any(looked(watch, *(paces(10.5 + i / 10, 61 + i / 10) for i in range(9)))), "it is the new measure"
    *_, back = looked(watch, *(paces(10 + i / 100, 20 + i / 10) for i in range(AGREEING)))
    assert back == {B: pytest.approx(1 / 3, rel=0.1)}


def test_bursts_and_noise_are_not_told():
    watch, rng = ConditionsWatch(PLAN), random.Random(3)
    looked(watch, *(paces(10 + i / 10, 20) for i in range(FIRST)))
    for i in range(300):
        burst = 4 if i % AGREEING and rng.random() < 0.3 else 1
        assert not watch.devices(paces(10 * rng.uniform(0.8, 1.3), 20 * rng.uniform(0.8, 1.3) * burst))
    calm = ConditionsWatch(PLAN)
    looked(calm, *(paces(10 + i / 10, 20) for i in range(FIRST)))
    for i in range(100):  # two bad looks in a row, then a good one
        assert not calm.devices(paces(10 + i / 100, 20.0 if i % 3 == 2 else 80.0 + i))


def test_old_figures_of_an_idle_device_say_nothing():
    watch = ConditionsWatch(PLAN)
    looked(watch, *(paces(10 + i / 10, 20 + i / 10) for i in range(FIRST)))
    burst = paces(10, 80)
    assert not any(looked(watch, *[burst] * 20)), "one look, told twenty times"


def test_the_beginning_is_told_once_every_stage_was_looked_at_often_enough():
    watch = ConditionsWatch(PLAN)
    for i in range(FIRST):
        assert watch.beginning() == {}
        watch.devices(paces(10 + i, 20 + i))
    assert watch.beginning() == {0: ((1, 11.0),), 1: ((1, 21.0), (2, 31.5)), 2: ((1, 1.0),)}
    watch.devices(paces(50, 60))
    assert watch.beginning()[0] == ((1, 11.0),)
    half = ConditionsWatch(PLAN)
    looked(half, *({1: ((1, 20.0 + i),)} for i in range(FIRST)))
    assert half.beginning() == {}, "the stages of one device only"


def test_a_link_that_became_slow_is_told_and_one_that_changed_by_a_trifle_is_not():
    watch = ConditionsWatch(PLAN)

    def look(ab, ba):
        return watch.links({(A, B): LinkProfile(ab, 1000), (B, A): LinkProfile(ba, 1000)}, 1000)

    for _ in range(FIRST + 1):
        assert not look(1.0, 0.1)
    found = [look(20.0, 0.4) for _ in range(AGREEING)]
    assert found[:-1] == [{}] * (AGREEING - 1) and found[-1].keys() == {(A, B)}
