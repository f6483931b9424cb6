"""A decider is told one event at a time, whatever its actions cause, and of its deadlines until the loop is closed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from peerllm.daemon.decide.deployment_life.deployment_events import Asked, DeadlineReached, MakePlan
from peerllm.daemon.decide.holdings import HouseholdHoldings
from peerllm.daemon.deployment.decision_loop import DecisionLoop
from peerllm.daemon.deployment.planning.next_plan import NextPlan
from peerllm.errors import InfeasibleError


class Decider:
    """Wants two things done of each event."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.due: float | None = None

    def handle(self, event: Any, now: float) -> list[Any]:
        self.heard.append(event)
        return [f"{len(self.heard)}a", f"{len(self.heard)}b"]

    def deadline(self) -> float | None:
        return self.due


async def test_what_an_action_causes_waits_for_the_other_actions() -> None:
    done: list[Any] = []

    def do(action: Any) -> None:
        if action == "1a":
            loop.feed(Asked())
        done.append(action)

    loop = DecisionLoop("m", Decider(), do)
    loop.feed(Asked())
    assert done == ["1a", "1b", "2a", "2b"]


async def test_deadlines_are_told_until_it_is_closed() -> None:
    decider, told = Decider(), asyncio.Event()

    def do(_: Any) -> None:
        if len(decider.heard) == 2:
            loop.close()
            told.set()

    loop = DecisionLoop("m", decider, do)
    decider.due = asyncio.get_running_loop().time()  # for good: it would be told again
    loop.feed(Asked())
    await asyncio.wait_for(told.wait(), 10)
    for _ in range(3):
        await asyncio.sleep(0)
    assert decider.heard == [Asked(), DeadlineReached()] and loop.closed


@pytest.mark.parametrize("compare", [True, False])
async def test_others_make_room_for_a_plan_that_is_needed_alone(compare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()
    plans = NextPlan(Any, Any, Any, HouseholdHoldings(), SimpleNamespace(inspected=1))  # type: ignore[arg-type]

    async def searched(*_: Any) -> Any:
        raise InfeasibleError("it does not fit", 1)

    async def make_room(fits: Any) -> bool:
        asked.append(fits)
        return False

    monkeypatch.setattr(plans, "_searched", searched)
    plans.make_room = make_room
    with pytest.raises(InfeasibleError):
        await plans.find(MakePlan(0, frozenset(), compare=compare), None, ())
    assert asked == ([] if compare else [plans.fits])
