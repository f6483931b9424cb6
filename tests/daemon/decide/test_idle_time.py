"""How long a model stays that nobody asks for, with a clock that the test moves."""

from __future__ import annotations

import pytest

from peerllm.daemon.decide.idle.idle_time import FOR_GOOD_S, ON_DEMAND_S, STARTING_S, IdleTime

NOW = 1000.0


def asked(idle: IdleTime, keep_s: float | None, at: float = NOW, over: float | None = None) -> IdleTime:
    idle.asked(keep_s, at)
    idle.over(at if over is None else over)
    return idle


@pytest.mark.parametrize(
    ("on_demand", "keep_s", "due"),
    [
        (True, None, NOW + ON_DEMAND_S), (True, 7.0, NOW + 7), (True, 0.0, NOW), (True, FOR_GOOD_S, None),
        (False, None, None), (False, 7.0, NOW + 7), (False, 0.0, NOW), (False, -5.0, None),
    ],
)  # fmt: skip
def test_who_started_it_and_what_the_last_request_said(
    on_demand: bool, keep_s: float | None, due: float | None
) -> None:
    assert asked(IdleTime(on_demand, 0.0), keep_s).due(serving=True) == due


def test_an_answer_under_way_keeps_it_and_the_time_runs_from_its_end() -> None:
    idle = IdleTime(True, 0.0)
    idle.asked(5.0, NOW)
    idle.asked(5.0, NOW + 1)
    idle.over(NOW + 2)
    assert idle.due(serving=True) is None
    idle.over(NOW + 90)
    assert idle.due(serving=True) == NOW + 95


def test_the_last_request_counts() -> None:
    idle = asked(asked(IdleTime(True, 0.0), FOR_GOOD_S), None, NOW + 1)
    assert idle.due(serving=True) == NOW + 1 + ON_DEMAND_S


def test_one_that_does_not_serve_yet_has_longer() -> None:
    idle = asked(IdleTime(True, NOW), 1.0)
    assert idle.due(serving=False) == NOW + STARTING_S
    idle.served(NOW + 50)
    assert idle.due(serving=True) == NOW + 51
