"""What people read of a deployment that does not go on."""

from __future__ import annotations

import pytest

from peerllm.daemon.decide.deployment_life.outage import Outage, listed


@pytest.fixture
def outage():
    one = Outage(lambda device: {"a": "laptop", "b": "mini-pc", "c": "jetson"}[device])
    for device in "abc":
        one.note(device, "online")
    return one


def test_nothing_is_said_where_there_is_none(outage):
    assert outage.message("planning", "planning for 3 devices", "") == "planning for 3 devices"
    assert outage.message("loading", "loading on laptop", "a") == "loading on laptop"
    assert outage.message("serving", "m is served", "abc") == ""
    assert outage.message("waiting", "planning", "") == outage.message("failed", "planning", "") == ""
    assert outage.waits_for("8 MB are missing") == "8 MB are missing"


def test_a_device_is_gone_and_others_take_over(outage):
    outage.note("b", "gone")
    outage.begin("abc", "mini-pc is gone (closed)")
    assert outage.message("planning", "planning for 2 devices", "") == "mini-pc is gone; planning for 2 devices"
    words = "mini-pc is gone; laptop and jetson take over its layers"
    assert outage.message("loading", "loading on laptop, jetson", "ac") == words
    assert outage.message("loading", "loading on laptop", "a") == "mini-pc is gone; laptop takes over its layers"
    assert outage.message("serving", "m is served", "ac") == "computing again what mini-pc held"
    outage.over()
    assert outage.message("serving", "m is served", "ac") == ""
    assert outage.message("planning", "planning for 2 devices", "") == "planning for 2 devices"


def test_nobody_can_take_over_until_it_is_back(outage):
    outage.note("b", "gone")
    outage.begin("abc", "mini-pc is gone (closed)")
    assert outage.waits_for("8 MB are missing") == "waiting for mini-pc to come back: 8 MB are missing"
    outage.note("c", "silent")
    assert outage.waits_for("8 MB are missing") == "waiting for mini-pc and jetson to come back: 8 MB are missing"
    assert outage.message("planning", "planning for 1 device", "").startswith("mini-pc and jetson are gone; ")
    assert outage.message("loading", "", "a") == "mini-pc and jetson are gone; laptop takes over their layers"
    outage.note("b", "online")
    assert outage.waits_for("8 MB are missing") == "waiting for jetson to come back: 8 MB are missing"
    outage.note("c", "online")
    assert outage.waits_for("8 MB are missing") == "8 MB are missing"
    assert outage.message("loading", "loading on mini-pc", "abc") == "mini-pc and jetson are back; loading on mini-pc"
    assert outage.message("serving", "", "abc") == "computing again what mini-pc and jetson held"


def test_a_silent_device_is_named_before_anything_is_done_about_it(outage):
    outage.note("b", "silent")
    assert outage.message("serving", "", "abc") == "nothing is heard of mini-pc, answers wait"
    assert outage.message("serving", "", "ac") == "", "it has no part in the plan"
    outage.note("b", "online")
    assert outage.message("serving", "", "abc") == ""


def test_a_plan_broken_by_something_else_says_by_what(outage):
    outage.begin("abc", "jetson: its engine was killed")
    assert outage.message("loading", "loading on jetson", "abc") == "jetson: its engine was killed; loading on jetson"
    assert outage.waits_for("nobody can") == "nobody can"
    assert outage.message("serving", "", "abc") == "computing again the answers so far"


def test_another_plan_breaks_before_answers_go_on_in_it(outage):
    outage.note("b", "gone")
    outage.begin("ab", "mini-pc is gone")
    outage.note("c", "gone")
    assert outage.waits_for("x") == "waiting for mini-pc to come back: x", "jetson had no part in it"
    outage.begin("ac", "jetson is gone")
    assert outage.waits_for("x") == "waiting for mini-pc and jetson to come back: x"
    outage.begin((), "loading failed")
    assert outage.waits_for("x") == "waiting for mini-pc and jetson to come back: x"


def test_an_outage_that_is_over_is_forgotten(outage):
    outage.note("b", "gone")
    outage.begin("ab", "mini-pc is gone")
    outage.over()
    outage.begin("ac", "jetson: its engine was killed")
    assert outage.waits_for("x") == "x" and outage.message("serving", "", "ac") == "computing again the answers so far"


def test_names_are_listed_as_a_person_does():
    assert [listed("a"), listed("ab"), listed("abc")] == ["a", "a and b", "a, b and c"]
