"""A deployment changes its coordinator: what is loaded stays loaded, whoever is not obeyed is refused."""

from __future__ import annotations

import asyncio

import pytest

from peerllm.daemon.control_messages import Reserve
from peerllm.daemon.deployment.described_model import ModelAtHand
from peerllm.daemon.facade import GenerateRequest, RunOptions
from peerllm.engine.messages import Submit, Tokens
from peerllm.errors import UnavailableError
from peerllm.types import Sampling
from tests.daemon.house import view

OPTIONS = RunOptions("big", name="big")
AHEAD = 2000


def at_hand(house, tmp_path):
    return ModelAtHand(house.models["big"], tmp_path, "")


async def served(house, letters="a"):
    await house["a"].coordinator.run(RunOptions("big"), lambda _: None)
    return view(house["a"])


def hand_over(house, deployment, to, *letters):
    for letter in letters:
        house[letter].worker.obey(deployment, house[to].me)


async def test_who_takes_over_loads_what_the_lost_one_had_and_nothing_else(houses, tmp_path):
    house = houses([2, 4, 5], big=8)
    before = await served(house)
    had = {letter: list(house[letter].engine.loaded) for letter in "bc"}
    kept = {letter: {key[1] for key in house[letter].engine.shards} for letter in "bc"}
    await house.vanish("a")
    hand_over(house, before.deployment, "b", "b", "c")
    b = house["b"].coordinator
    b.told(house["b"].me, house["b"].worker.holdings())
    b.take_over(OPTIONS, at_hand(house, tmp_path), before.deployment, before.epoch + AHEAD, created=7)
    await house.until(lambda: view(house["b"]).state == "serving")
    after = view(house["b"])
    assert after.deployment == before.deployment
    assert after.epoch > before.epoch + AHEAD
    assert (after.name, after.created) == ("big", 7)
    lost = {layer for stage in before.stages if stage.device == house["a"].me for layer in _layers(stage)}
    fresh = [one for letter in "bc" for one in house[letter].engine.loaded[len(had[letter]) :]]
    assert sorted(layer for first, last in fresh for layer in range(first, last + 1)) == sorted(lost)
    for letter in "bc":
        assert kept[letter] <= {key[1] for key in house[letter].engine.shards}


def _layers(stage):
    return range(stage.first_layer, stage.last_layer + 1)


async def test_until_the_votes_are_given_the_others_refuse_who_would_take_over(houses):
    house = houses([2, 4, 5], big=8)
    before = await served(house)
    asked = Reserve(before.deployment, before.epoch + AHEAD, 1000, 10.0, 0)
    refused = await house["c"].worker.answer(house["b"].me, asked)
    assert refused.error == "RefusedError" and "obeys another coordinator" in refused.reason
    hand_over(house, before.deployment, "b", "c")
    assert not (await house["c"].worker.answer(house["b"].me, asked)).error
    old = await house["c"].worker.answer(house["a"].me, Reserve(before.deployment, before.epoch + AHEAD + 1, 1, 10.0))
    assert "obeys another coordinator" in old.reason
    hand_over(house, before.deployment, "a", "c")  # which lets go of it


async def test_what_was_only_reserved_is_dropped_when_the_coordinator_changes(houses):
    house = houses([2, 4, 5], big=8)
    before = await served(house)
    c = house["c"]
    promised = c.ledger.promised_bytes
    assert not (await c.worker.answer(house["a"].me, Reserve(before.deployment, before.epoch + 1, 1000, 10.0))).error
    assert c.ledger.promised_bytes == promised + 1000
    hand_over(house, before.deployment, "b", "c")
    assert c.ledger.promised_bytes == promised
    assert {one.coordinator for one in c.ledger.promises()} == {house["b"].me}


async def test_a_deployment_that_drains_ends_its_answers_and_refuses_others(houses):
    house = houses([9, 9], big=8)
    before = await served(house)
    a = house["a"].coordinator
    request = GenerateRequest(before.deployment, (1, 2, 3), 5, Sampling())
    running = a.generate(request)
    first = running.__anext__()
    task = asyncio.ensure_future(first)
    await house.until(lambda: any(isinstance(one, Submit) for one in house["a"].told))
    a.drain(before.deployment, "device-b")
    assert view(house["a"]).state == "stopped"
    assert a.streaming == {before.deployment: True}
    with pytest.raises(UnavailableError, match="device-b serves big now"):
        await a.generate(request).__anext__()
    (submit,) = [one for one in house["a"].told if isinstance(one, Submit)]
    a.tokens(Tokens(before.deployment, submit.sequence, 0, (5, 6), "stop"))
    assert (await task).ids == (5, 6)
    await running.aclose()
    assert a.streaming == {before.deployment: False}
    await a.give_way(before.deployment)
    assert a.views() == ()


async def test_a_deployment_that_drains_no_more_takes_new_sequences(houses):
    house = houses([9, 9], big=8)
    before = await served(house)
    a = house["a"].coordinator
    a.drain(before.deployment, "device-b")
    a.drain(before.deployment, "")
    assert view(house["a"]).state == "serving"
    running = a.generate(GenerateRequest(before.deployment, (1, 2, 3), 5, Sampling()))
    task = asyncio.ensure_future(running.__anext__())
    await house.until(lambda: any(isinstance(one, Submit) for one in house["a"].told))
    (submit,) = [one for one in house["a"].told if isinstance(one, Submit)]
    a.tokens(Tokens(before.deployment, submit.sequence, 0, (5, 6), "stop"))
    assert (await task).ids == (5, 6)
    await running.aclose()


async def test_what_does_not_serve_lets_new_sequences_wait_when_it_drains_no_more(houses):
    house = houses([3, 6], big=8)
    before = await served(house)
    await house.vanish("b")
    await house.until(lambda: view(house["a"]).state == "waiting")
    a = house["a"].coordinator
    a.drain(before.deployment, "device-b")
    a.drain(before.deployment, "")
    running = a.generate(GenerateRequest(before.deployment, (1, 2, 3), 5, Sampling()))
    assert (await running.__anext__()).queued == 1, "it waits for the device that is gone"
    assert a.streaming[before.deployment]
    await running.aclose()


async def test_what_does_not_serve_ends_its_answers_at_once_when_another_goes_on_with_it(houses):
    house = houses([3, 6], big=8)
    before = await served(house)
    await house.vanish("b")
    await house.until(lambda: view(house["a"]).state == "waiting")
    request = GenerateRequest(before.deployment, (1, 2, 3), 5, Sampling())

    async def heard():
        return [chunk async for chunk in house["a"].coordinator.generate(request)]

    waiting = asyncio.ensure_future(heard())
    await house.until(lambda: house["a"].coordinator.streaming[before.deployment])
    house["a"].coordinator.drain(before.deployment, "device-b")
    await asyncio.wait({waiting})
    assert isinstance(waiting.exception(), UnavailableError)
    assert "device-b serves big now" in str(waiting.exception())


async def test_an_answer_goes_on_after_the_ids_that_are_known(houses):
    house = houses([9, 9], big=8)
    before = await served(house)
    a = house["a"].coordinator
    wanted = GenerateRequest(before.deployment, (1, 2, 3), 5, Sampling(), answer=(7, 8))
    task = asyncio.ensure_future(a.generate(wanted).__anext__())
    await house.until(lambda: any(isinstance(one, Submit) for one in house["a"].told))
    (submit,) = [one for one in house["a"].told if isinstance(one, Submit)]
    assert (submit.answer, submit.max_tokens) == ((7, 8), 5)
    a.tokens(Tokens(before.deployment, submit.sequence, 2, (9,), "stop"))
    assert (await task).ids == (9,)


async def test_a_device_that_starts_again_leaves_alone_what_another_goes_on_with(houses, tmp_path):
    house = houses([2, 4, 5], big=8)
    before = await served(house)
    assert (tmp_path / "aaaa.jsonl").read_text()
    await house.vanish("a")
    hand_over(house, before.deployment, "b", "b", "c")
    b = house["b"].coordinator
    b.told(house["b"].me, house["b"].worker.holdings())
    b.take_over(OPTIONS, at_hand(house, tmp_path), before.deployment, before.epoch + AHEAD, created=7)
    await house.until(lambda: view(house["b"]).state == "serving")
    again = type(house["a"].coordinator)(house["a"], tmp_path / "aaaa.jsonl")
    await again.start()
    assert again.views() == ()
    assert not (tmp_path / "aaaa.jsonl").read_text()


async def test_what_was_inherited_comes_back_after_a_restart(houses, tmp_path):
    house = houses([2, 4, 5], big=8)
    before = await served(house)
    await house.vanish("a")
    hand_over(house, before.deployment, "b", "b", "c")
    b = house["b"].coordinator
    b.told(house["b"].me, house["b"].worker.holdings())
    b.take_over(OPTIONS, at_hand(house, tmp_path), before.deployment, before.epoch + AHEAD, created=7)
    await b._remembering
    assert before.deployment in (tmp_path / "bbbb.jsonl").read_text(), "before it serves"
    await house.until(lambda: view(house["b"]).state == "serving")
    await b._remembering
    asked = []
    again = type(b)(house["b"], tmp_path / "bbbb.jsonl")

    def inherited(deployment):
        asked.append(deployment)
        return at_hand(house, tmp_path)

    await house["a"].coordinator.close()  # nothing is heard of it
    house["b"].coordinator = type(b)(house["b"], tmp_path / "none.jsonl")
    await again.start(inherited)
    try:
        assert asked == [before.deployment]
        (only,) = again.views()
        assert (only.deployment, only.name) == (before.deployment, "big")
    finally:
        await again.close()
        await b.close()


async def test_who_had_a_part_is_remembered_over_a_restart(houses, tmp_path):
    house = houses([2, 4, 5], big=8)
    await served(house)
    a = house["a"].coordinator
    again = type(a)(house["a"], tmp_path / "aaaa.jsonl")
    house["a"].coordinator = type(a)(house["a"], tmp_path / "none.jsonl")
    await a.close()
    await again.start()
    try:
        assert again.took_part == {before: frozenset(house.devices) for before in again.took_part}
        assert len(again.took_part) == 1
    finally:
        await again.close()


async def test_whether_the_others_could_serve_counts_what_they_have_loaded(houses, tmp_path):
    house = houses([3, 5, 5], big=8)
    before = await served(house)
    house.part("a")
    b = house["b"].coordinator
    assert not await b.could_serve(OPTIONS, at_hand(house, tmp_path), "e" * 32), "its memory is promised"
    for letter in "bc":
        b.told(house[letter].me, house[letter].worker.holdings())
    assert await b.could_serve(OPTIONS, at_hand(house, tmp_path), before.deployment)
    assert [one.views() for one in (b,)] == [()], "nothing is begun"
    house.part("c")
    assert not await b.could_serve(OPTIONS, at_hand(house, tmp_path), before.deployment)


async def test_what_drains_ends_its_answers_when_it_cannot_go_on(houses):
    house = houses([3, 6], big=8)
    before = await served(house)
    request = GenerateRequest(before.deployment, (1, 2, 3), 5, Sampling())
    running = asyncio.ensure_future(house["a"].coordinator.generate(request).__anext__())
    await house.until(lambda: any(isinstance(one, Submit) for one in house["a"].told))
    house["a"].coordinator.drain(before.deployment, "device-b")
    assert not running.done()
    await house.vanish("b")
    await asyncio.wait({running})
    assert "device-b serves big now" in str(running.exception())


async def test_a_coordinator_whose_devices_followed_another_for_a_while_goes_beyond_its_epochs(houses):
    house = houses([2, 4, 5], big=8)
    before = await served(house)
    b, c = house["b"], house["c"]
    c.worker.obey(before.deployment, b.me)
    asked = Reserve(before.deployment, before.epoch + AHEAD, 1000, 600.0, 0)
    assert not (await c.worker.answer(b.me, asked)).error
    c.ledger.commit(before.deployment, before.epoch + AHEAD, b.me, 0.0)
    c.worker.obey(before.deployment, house["a"].me)
    await house.vanish("b")
    await house.come_back("b")
    await house.until(lambda: view(house["a"]).state == "serving" and view(house["a"]).epoch > before.epoch + AHEAD)
