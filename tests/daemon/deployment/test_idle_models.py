"""Models that requests start, and that leave when nobody asks or another needs their memory."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from peerllm.daemon.deployment.loading import idle_models
from peerllm.daemon.facade import GenerateRequest, RunOptions
from peerllm.engine.messages import Submit, Tokens
from peerllm.errors import BadInputError, InfeasibleError, RefusedError
from peerllm.types import Sampling
from tests.daemon.house import quiet, used


def names(device):
    return {view.name for view in device.coordinator.views()}


def of(device, name):
    return next(one for one in device.coordinator._deployments.values() if one.name == name)


async def ask(house, device, name, keep_s=None):
    """One answer of one token."""
    view = next(one for one in device.coordinator.views() if one.name == name)
    request = GenerateRequest(view.deployment, [1], 1, Sampling(temperature=0.0), keep_alive_s=keep_s)
    told = len(device.told)

    async def read():
        async with aclosing(device.coordinator.generate(request)) as chunks:
            return [chunk async for chunk in chunks]

    reading = asyncio.ensure_future(read())
    await house.until(lambda: len(device.told) > told)
    (order,) = (one for one in device.told[told:] if isinstance(one, Submit))
    device.coordinator.tokens(Tokens(view.deployment, order.sequence, 0, (7,), "length"))
    return await asyncio.wait_for(reading, 10)


async def test_what_a_request_started_goes_when_nobody_asked_for_so_long(houses):
    house = houses([3, 3], small=4)
    a = house["a"]
    assert await a.coordinator.wake("small") == "small"
    assert len(used(a)) == 2
    await ask(house, a, "small", keep_s=0.05)
    (seen,) = a.coordinator.views()
    assert seen.expires
    await house.until(lambda: not a.coordinator.views())
    await house.until(house.empty)
    assert not a.coordinator.asleep, "nobody's options are to be kept"
    assert not list(house.folder.glob("aaaa.jsonl")) or not (house.folder / "aaaa.jsonl").read_text()


async def test_what_a_person_started_stays_and_comes_back_as_it_was(houses):
    house = houses([9], small=4)
    a = house["a"]
    options = RunOptions("small", name="mine", context=32)
    await a.coordinator.run(options, quiet)
    await ask(house, a, "mine")
    assert of(a, "mine").idle.due(serving=True) is None and not a.coordinator.views()[0].expires
    await a.coordinator.keep(a.coordinator.views()[0].deployment, 0.0)
    assert not a.coordinator.views() and house.empty()
    assert a.coordinator.asleep == [options]
    a.restarted()
    await a.coordinator.start()
    assert a.coordinator.asleep == [options] and not a.coordinator.views()
    assert await a.coordinator.wake("small") == "mine"
    (seen,) = a.coordinator.views()
    assert (seen.name, seen.context) == ("mine", 32) and not a.coordinator.asleep
    await a.coordinator.keep(seen.deployment, 0.0)
    await a.coordinator.stop("mine")
    assert not a.coordinator.asleep


async def test_the_longest_idle_makes_room_and_what_a_person_started_does_not(houses):
    house = houses([9], one=3, two=3, three=3)
    a = house["a"]
    for name in ("one", "two"):
        await a.coordinator.wake(name)
    await ask(house, a, "one")
    await a.coordinator.wake("three")
    assert names(a) == {"one", "three"}, "two was idle for longest"
    await a.coordinator.run(RunOptions("one"), quiet)
    await a.coordinator.run(RunOptions("three"), quiet)
    with pytest.raises(InfeasibleError):
        await a.coordinator.wake("two")
    assert names(a) == {"one", "three"}, "a person started them"


async def test_none_goes_in_vain_and_none_that_answers(houses):
    house = houses([9], one=3, two=3, huge=30, three=6)
    a = house["a"]
    for name in ("one", "two"):
        await a.coordinator.wake(name)
    with pytest.raises(InfeasibleError):
        await a.coordinator.wake("huge")
    assert names(a) == {"one", "two"}
    of(a, "one").idle.asked(None, 1e9)
    with pytest.raises(InfeasibleError):
        await a.coordinator.wake("three")
    of(a, "one").idle.over(1e9)
    await a.coordinator.wake("three")
    assert names(a) == {"three"}


async def test_models_of_another_device_make_way_too(houses):
    house = houses([6, 6], one=4, two=4, three=8)
    a, b = house["a"], house["b"]
    await a.coordinator.wake("one")
    await b.coordinator.wake("two")
    assert a.coordinator.views()[0].idle_since
    of(b, "two").idle.asked(None, 1e9)
    with pytest.raises(InfeasibleError):
        await a.coordinator.wake("three")
    assert names(a) == {"one"} and names(b) == {"two"}, "two is used"
    assert not b.coordinator.views()[0].idle_since
    with pytest.raises(RefusedError, match="two is used"):
        await b.coordinator.make_way(of(b, "two").id)
    of(b, "two").idle.over(1e9)
    await a.coordinator.wake("three")
    assert names(a) == {"three"} and not names(b)
    await b.coordinator.make_way("d" * 32)


async def test_two_devices_that_are_asked_at_once_start_it_once(houses, monkeypatch):
    house = houses([9, 9], small=4)
    a, b = house["a"], house["b"]
    house.views_travel = False
    a.engine.gate.clear()
    b.engine.gate.clear()
    starts = [asyncio.ensure_future(one.coordinator.wake("small")) for one in (b, a)]
    await house.until(lambda: names(a) == names(b) == {"small"})
    house.views_travel = True
    a.changed()
    await asyncio.wait_for(starts[0], 10)
    assert names(a) == {"small"} and not names(b), "the lower id goes on"
    monkeypatch.setattr(b.coordinator, "_begin", None)  # one that runs elsewhere is not even begun
    assert await b.coordinator.wake("small") == "small" and not names(b)
    for one in (a, b):
        one.engine.gate.set()
    assert await asyncio.wait_for(starts[1], 10) == "small"
    await house.until(lambda: not b.worker.holdings() or len(used(a)) > 0)
    assert a.coordinator.views()[0].state == "serving" and not names(b)


async def test_two_that_serve_the_same_become_one_when_one_is_unused(houses):
    house = houses([9, 9], small=4)
    a, b = house["a"], house["b"]
    house.views_travel = False
    for one in (b, a):
        await one.coordinator.wake("small")
    of(b, "small").idle.asked(None, 1e9)
    house.views_travel = True
    a.changed()
    await ask(house, b, "small")
    assert names(a) == names(b) == {"small"}, "somebody uses both"
    of(b, "small").idle.over(1e9)
    a.changed()
    await house.until(lambda: not names(b))
    assert names(a) == {"small"}


async def test_a_persons_start_is_not_ended_by_a_request(houses):
    house = houses([9, 9], small=4)
    a, b = house["a"], house["b"]
    house.views_travel = False
    a.engine.gate.clear()
    b.engine.gate.clear()
    person = asyncio.ensure_future(b.coordinator.run(RunOptions("small"), quiet))
    asked = asyncio.ensure_future(a.coordinator.wake("small"))
    await house.until(lambda: names(a) == names(b) == {"small"})
    house.views_travel = True
    b.changed()
    await asyncio.wait_for(asked, 10)
    assert not names(a)
    for one in (a, b):
        one.engine.gate.set()
    assert await asyncio.wait_for(person, 10) == "small"


async def test_a_person_takes_over_what_a_request_started(houses):
    house = houses([9], small=4)
    a = house["a"]
    await a.coordinator.wake("small")
    number = a.coordinator.views()[0].deployment
    await a.coordinator.run(RunOptions("small"), quiet)
    assert a.coordinator.views()[0].deployment == number and not a.coordinator.views()[0].expires
    await a.coordinator.stop("small")
    await a.coordinator.wake("small")
    await a.coordinator.run(RunOptions("small", name="mine"), quiet)
    assert names(a) == {"mine"}
    with pytest.raises(BadInputError, match="other options"):
        await a.coordinator.run(RunOptions("small", name="other"), quiet)
    assert await a.coordinator.wake("small") == "mine", "a request takes it as it is"


def test_when_it_goes_is_told_as_a_time_of_day(monkeypatch):
    idle = idle_models.IdleTime(True, 100.0)
    monkeypatch.setattr(idle_models.time, "time", lambda: 5000.0)
    assert idle_models.expiry(idle, 110.0) == 5290
    assert idle_models.expiry(replace(idle, keep_s=-1.0), 110.0) == 0
