"""Two devices that start the same model for requests agree, whoever hears first, which of them goes on."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from peerllm.daemon.control_messages import DeploymentView
from peerllm.daemon.decide.idle.same_start import gives_way, same_model

A, B = "a" * 64, "b" * 64
VIEW = DeploymentView("1", "small", "loading", 1, A, (), (), name="small", on_demand=True)


@pytest.mark.parametrize(
    ("own", "unused", "other", "gives"),
    [
        ({}, False, {}, False), ({"coordinator": B}, False, {}, True),
        ({}, False, {"on_demand": False}, True), ({}, False, {"state": "serving"}, True),
        ({"coordinator": B}, False, {"state": "failed"}, False),
        ({"coordinator": B}, False, {"state": "stopped"}, False),
        ({"coordinator": B, "state": "serving"}, True, {}, False),
        ({"coordinator": B, "state": "serving"}, True, {"state": "serving"}, True),
        ({"coordinator": B, "state": "serving"}, False, {"state": "serving"}, False),
        ({"state": "serving"}, True, {"state": "serving"}, False),
        ({"coordinator": B, "state": "serving"}, True, {"state": "serving", "on_demand": False}, False),
        ({"coordinator": B}, False, {"model": "other", "name": "other"}, False),
    ],
)  # fmt: skip
def test_who_goes(own: dict[str, object], unused: bool, other: dict[str, object], gives: bool) -> None:
    coordinator = A if own.get("coordinator") == B else B
    there = replace(VIEW, **{"coordinator": coordinator, **other})
    assert gives_way(replace(VIEW, **own), unused, [there]) is gives


def test_exactly_one_of_two_goes_on() -> None:
    for first, second in product(("planning", "loading", "waiting", "serving"), repeat=2):
        a, b = replace(VIEW, state=first), replace(VIEW, state=second, coordinator=B)
        assert gives_way(a, True, [b]) is not gives_way(b, True, [a]), (first, second)


def test_the_same_model_under_another_name_or_path() -> None:
    numbered = replace(VIEW, model="/disk/small", name="small-2")
    assert same_model("/home/small", [numbered]) == [numbered]
    assert same_model("small", [replace(VIEW, name="mine")]), "a person calls it mine"
    assert not same_model("/home/small", [replace(VIEW, model="/disk/large", name="large")])
