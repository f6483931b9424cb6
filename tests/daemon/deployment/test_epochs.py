"""A running deployment over a household in memory: later epochs, what they reuse, and answers that wait for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from peerllm.daemon.control_messages import Carry, Release, Trouble
from peerllm.daemon.decide.deployment_life import situation
from peerllm.daemon.deployment.planning import conditions_reader
from peerllm.daemon.facade import GenerateRequest, RunOptions
from peerllm.engine.messages import Submit, Tokens
from peerllm.types import Sampling
from tests.daemon.house import quiet, used, view

PACING = {"COMPARE_EVERY_S": 0.0}


def loaded(house):
    return {device.me[0]: list(device.engine.loaded) for device in house.devices.values()}


async def answering(house, device, ids=(3, 4)):
    """A stream that has brought some tokens, and the number that the engine knows it by."""
    stream = device.coordinator.generate(GenerateRequest(view(device).deployment, (1, 2), 9, Sampling(seed=5)))
    first = asyncio.ensure_future(anext(stream))
    await house.until(lambda: any(isinstance(one, Submit) for one in device.told))
    number = next(one.sequence for one in device.told if isinstance(one, Submit))
    device.coordinator.tokens(Tokens(view(device).deployment, number, 0, ids))
    assert (await first).ids == ids
    return stream, number


async def test_a_device_that_dies_costs_only_what_it_held(houses):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    (other,) = used(a) - {"a"}
    mine = loaded(house)["a"]
    await house.vanish(other)
    await house.until(lambda: view(a).state == "serving" and view(a).epoch > 1)
    again = loaded(house)["a"][len(mine) :]
    whole = [layer for first, last in mine for layer in range(first, last + 1)]
    assert not any(layer in whole for first, last in again for layer in range(first, last + 1))
    await house.until(lambda: {epoch for _, epoch in a.engine.epochs} == {view(a).epoch})


async def test_people_read_what_answers_wait_for(houses):
    house = houses([4, 6, 6], m=8)
    a, said = house["a"], []
    changed = a.changed
    a.changed = lambda: (said.extend((one.state, one.message) for one in a.coordinator.views()), changed())
    await a.coordinator.run(RunOptions("m"), quiet)
    (other,) = used(a) - {"a"}
    third = "bc".replace(other, "")
    said.clear()
    house.part(other)
    house.changed()
    words = f"nothing is heard of device-{other}, answers wait"
    assert (view(a).state, view(a).message, a.coordinator.served()[0].message) == ("serving", words, words)
    await house.come_back(other)
    assert view(a).message == ""
    house.switch_gate.clear()
    await house.vanish(other)
    await house.until(lambda: view(a).state == "serving" and view(a).epoch > 1)
    assert view(a).message == f"computing again what device-{other} held"
    house.switch_gate.set()
    await house.until(lambda: not view(a).message)
    assert ("planning", f"device-{other} is gone; planning for 2 devices") in said
    assert ("loading", f"device-{other} is gone; device-a and device-{third} take over its layers") in said
    await house.vanish(third)
    await house.until(lambda: view(a).state == "waiting")
    assert view(a).reason.startswith(f"waiting for device-{third} to come back: m needs ")
    assert a.coordinator.served()[0].reason == view(a).reason
    await house.come_back(third)
    await house.until(lambda: view(a).state == "serving")
    assert "missing" not in view(a).reason


async def test_a_plan_that_breaks_before_answers_go_on_in_it_does_not_end_the_outage(houses):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    (other,) = used(a) - {"a"}
    third = "bc".replace(other, "")
    house.switch_gate.clear()
    await house.vanish(other)
    await house.until(lambda: view(a).state == "serving" and view(a).epoch > 1)
    await house.vanish(third)
    await house.until(lambda: view(a).state == "waiting")
    switching = a.coordinator._of(view(a).deployment)._work._tasks["switch"]
    house.switch_gate.set()
    await asyncio.wait({switching}, timeout=5)
    both = " and ".join(f"device-{letter}" for letter in "bc")
    assert view(a).reason.startswith(f"waiting for {both} to come back: ")


async def test_a_silent_device_that_is_back_serves_on_with_what_it_has(houses, monkeypatch):
    monkeypatch.setattr(situation, "GO_ON_S", 0.05)
    house = houses([3, 3, 3], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    before, epoch = loaded(house), view(a).epoch
    house.part("b")
    await house.until(lambda: view(a).state == "waiting")
    assert "silent" in view(a).reason
    await house.come_back("b")
    await house.until(lambda: view(a).state == "serving")
    assert (loaded(house), view(a).epoch, view(a).message) == (before, epoch, "")


async def test_a_device_back_after_others_took_over_is_used_again_without_loading(houses):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    (other,) = used(a) - {"a"}
    house.part(other, "gone")
    await house.until(lambda: view(a).state == "serving" and other not in used(a))
    await house.until(lambda: {epoch for _, epoch in a.engine.epochs} == {view(a).epoch})  # all are told to let go
    (third,) = {"b", "c"} - {other}
    at_other = loaded(house)[other]
    house._departures.pop(house[other].me)
    house[other].online = True
    a.coordinator.told(house[other].me, house[other].worker.holdings())  # as its first words
    house.part(third, "gone")
    a.coordinator.device_is(house[other].me, "online")
    await house.until(lambda: view(a).state == "serving" and other in used(a))
    assert loaded(house)[other] == at_other, "what it had was still there"
    house._departures.pop(house[third].me)
    await house.come_back(third)


async def test_a_device_that_lost_what_it_had_is_noticed_by_what_it_says(houses):
    house = houses([3, 3, 3], m=8)
    a, b = house["a"], house["b"]
    await a.coordinator.run(RunOptions("m"), quiet)
    b.engine.clear()
    b.worker._report = lambda *_: None  # it never gets to say that its engine died
    b.worker.engine_lost("killed")
    b.worker._report = b.report
    await house.until(lambda: view(a).epoch > 1 and view(a).state == "serving")
    assert b.engine.stages


async def test_the_sources_engine_gets_running_answers_again_with_what_is_known(houses):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    stream, number = await answering(house, a)
    del a.told[:]
    a.engine.clear()
    a.worker.engine_lost("the engine crashed")
    await house.until(lambda: view(a).state == "serving" and view(a).epoch > 1)
    (again,) = [one for one in a.told if isinstance(one, Submit)]
    assert (again.sequence, again.prompt, again.answer, again.max_tokens) == (number, (1, 2), (3, 4), 9)
    assert again.sampling.seed == 5 and a.switched[-1] == view(a).epoch
    after = asyncio.ensure_future(anext(stream))
    a.coordinator.tokens(Tokens(view(a).deployment, number, 2, (6,), "length"))
    assert (await after).ids == (6,)


async def test_a_device_that_leaves_hands_over_what_it_keeps_before_it_is_let_go(houses):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    stream, _ = await answering(house, a)
    (other,) = used(a) - {"a"}
    asked, ask = [], a.ask

    async def asking(device, question, timeout_s):
        if isinstance(question, Carry | Release):
            asked.append((device[0], type(question).__name__))
        return await ask(device, question, timeout_s)

    a.ask = asking
    a.coordinator.device_is(house[other].me, "leaving", "is going down")
    await house.until(lambda: view(a).state == "serving" and other not in used(a))
    await house.until(lambda: not house[other].engine.shards)
    (carried,) = house[other].engine.carried
    assert carried.to.device[0] in used(a) - {"a"} and carried.to_epoch == view(a).epoch
    assert asked[0] == (other, "Carry") and (other, "Release") in asked
    assert not any(isinstance(one, Trouble) for one in a.told) and view(a).state == "serving"
    await stream.aclose()


async def test_a_device_that_became_slow_is_relieved_and_one_that_did_not_is_not(houses, monkeypatch):
    monkeypatch.setattr(conditions_reader, "EVERY_S", 0.01)
    house = houses([4, 9, 9], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    stream, _ = await answering(house, a)
    (slow,) = used(a) - {"a"}
    looks = 0

    def paces(base):
        nonlocal looks
        looks += 1
        return ((1, base + looks * 1e-6, 0.1),)

    for letter in "abc":
        house[letter].engine.paces = paces(5.0)
    ask = a.ask

    async def asking(device, question, timeout_s):
        times = 4.0 if device == house[slow].me and looks > 40 else 1.0
        house[device[0]].engine.paces = paces(5.0 * times)
        return await ask(device, question, timeout_s)

    a.ask = asking
    await house.until(lambda: looks > 35)
    assert slow in used(a) and view(a).epoch == 1, "noise moves nothing"
    await asyncio.wait_for(house.until(lambda: slow not in used(a) and view(a).state == "serving"), 10)
    await stream.aclose()


async def test_a_coordinator_that_starts_again_goes_on_with_what_others_have_loaded(houses):
    house = houses([3, 3, 3], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    before, first = loaded(house), view(a)
    await house.until((house.folder / f"{a.me[:4]}.jsonl").exists)
    (deployment,) = a.coordinator._deployments.values()
    await deployment.stop(left=True)  # the others are not told anything
    a.engine.clear()
    a.worker.engine_lost("the daemon died")
    again = a.restarted()
    for letter in "bc":
        again.told(house[letter].me, house[letter].worker.holdings())
    await again.start()
    await house.until(lambda: again.views() and again.views()[0].state == "serving")
    seen = again.views()[0]
    assert (seen.deployment, seen.epoch > first.epoch) == (first.deployment, True)
    assert {one: loaded(house)[one] for one in "bc"} == {one: before[one] for one in "bc"}, "nothing is loaded twice"


def test_sizes_that_follow_another_keep_it_where_they_repair_and_grow_where_they_compare():
    from peerllm.daemon.decide.demand import Moving, sizes_from

    moving = Moving(None, (2, 1024), {}, {}, (), compare=False)
    repair = list(sizes_from(RunOptions("m"), 8192, 1024, moving))
    assert repair == [(2, 1024), (1, 1024)]
    compare = list(sizes_from(RunOptions("m"), 8192, 1024, replace(moving, compare=True)))
    assert compare == [(4, 2048), (4, 1024), (2, 1024), (1, 1024)]
