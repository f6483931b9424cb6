"""When a device without layers keeps its engine, and who hears what happens to it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from peerllm.daemon.control_messages import DeploymentView
from peerllm.daemon.engine_events import EngineEvents, may_need_engines
from peerllm.engine.messages import LinkLost, LinkTraffic, LoadProgress, Tokens
from peerllm.types import Stage
from tests.daemon.noting import Noting

ALONE = DeploymentView("d" * 32, "m", "serving", 1, "a", (Stage("a", 0, 3),), (1,))
SEVERAL = replace(ALONE, stages=(Stage("a", 0, 1), Stage("b", 2, 3)), stage_memory_bytes=(1, 1))


@pytest.mark.parametrize(("view", "needed"), [
    (replace(ALONE, state="planning", stages=()), True),
    (replace(ALONE, state="loading"), True),
    (ALONE, False),
    (SEVERAL, True),
    (replace(SEVERAL, state="stopped"), False),
    (replace(ALONE, state="waiting", stages=()), False),
])  # fmt: skip
def test_engines_stay_where_one_device_may_have_to_replace_another(view: DeploymentView, needed: bool) -> None:
    assert may_need_engines(view) is needed


class Household(SimpleNamespace):
    """The parts of a daemon that an engine's events reach; `calls` are what they were told."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.own: tuple[DeploymentView, ...] = ()
        self.others: tuple[DeploymentView, ...] = ()
        self.promises: tuple[str, ...] = ()
        super().__init__(
            network=Noting("network", self.calls, link_monitor=Noting("link_monitor", self.calls)),
            coordinator=Noting("coordinator", self.calls, views=lambda: self.own),
            worker=Noting("worker", self.calls),
            home=SimpleNamespace(me="me", views=lambda: self.others),
            ledger=SimpleNamespace(promises=lambda: self.promises),
            poke=lambda: self.calls.append(("poke",)),
        )
        self.events = EngineEvents(self)  # type: ignore[arg-type]


def test_an_engine_is_needed_for_what_is_promised_and_for_what_anybody_plans() -> None:
    household = Household()
    assert not household.events.needed()
    household.promises = ("of a deployment",)
    assert household.events.needed()
    household.promises = ()
    for where in ("own", "others"):
        for view, needed in ((SEVERAL, True), (ALONE, False)):
            setattr(household, where, (ALONE, view))
            assert household.events.needed() is needed, (where, view.state)


def test_what_the_engine_tells_reaches_who_acts_on_it() -> None:
    household = Household()
    tokens, lost = Tokens("d", 1, 0, (5,)), LinkLost("d", "b", "cut")
    progress = LoadProgress("d", 0, 1, 2)
    for event in (tokens, progress, lost, LinkTraffic((("b", 2048, 0.5), ("c", 64, 0.1)), 0.002)):
        household.events.heard(event)
    assert household.calls == [
        ("coordinator.tokens", tokens), ("worker.progress", progress), ("worker.link_lost", lost),
        ("link_monitor.framed", "b", 2048, 0.5), ("link_monitor.framed", "c", 64, 0.1),
        ("link_monitor.handover", 0.002),
    ]  # fmt: skip


def test_a_lost_engine_and_a_new_one_are_told_to_the_coordinator_of_this_device() -> None:
    household = Household()
    household.events.lost("killed")
    assert household.calls == [
        ("worker.engine_lost", "killed"), ("coordinator.device_is", "me", "gone", "lost its engine (killed)"), ("poke",)
    ]  # fmt: skip
    household.calls.clear()
    household.events.ready()
    assert household.calls == [
        ("network.set_hello_changed",), ("link_monitor.engine_changed",), ("coordinator.device_is", "me", "online"),
        ("poke",),
    ]  # fmt: skip
