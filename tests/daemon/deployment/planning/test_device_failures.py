"""What failed on a device changes the next plan, for a bounded time; and a new plan keeps what an earlier one gave."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from peerllm.daemon.control_messages import Activate, Answer, Progress, Release, Reserve, Trouble
from peerllm.daemon.decide.demand import sizes
from peerllm.daemon.decide.deployment_life import pacing
from peerllm.daemon.deployment.establishing import EpochNegotiation
from peerllm.daemon.deployment.figures import progress_report
from peerllm.daemon.deployment.planning.device_failures import FAILURE_S, DeviceFailures
from peerllm.daemon.facade import RunOptions
from peerllm.engine.messages import LoadStage
from peerllm.errors import EngineDownError, EngineError, ModelError, RefusedError, UnavailableError
from tests.daemon.decide.test_demand import A, B, C, household
from tests.daemon.house import BLOCK, inspected, quiet, used, view

PACING = {"ECHO_S": 0.0, "QUICK_REPAIRS": 99, "COMPARE_EVERY_S": 0.05}


def loads(house, letter):
    return sum(isinstance(message, LoadStage) for message in house[letter].engine.seen)


# ---- decided ----


def test_first_avoided_then_left_out_and_after_a_while_trusted_again():
    everyone, failures = household(1000, 1000, 1000), DeviceFailures(A)
    assert failures.usable(everyone, 0.0) == [everyone] and failures.repeated(0.0) is None
    failures.note(B, 1, 800, EngineError("b: damaged"), 0.0)
    without = {device: one for device, one in everyone.items() if device != B}
    assert failures.usable(everyone, 0.0) == [without, everyone] and failures.repeated(0.0) is None
    failures.note(B, 1, 800, EngineError("the same failure, told again"), 1.0)
    assert failures.usable(everyone, 1.0) == [without, everyone]
    failures.note(B, 2, 800, EngineError("b: damaged again"), 1.0)
    assert failures.usable(everyone, 1.0) == [without]
    assert str(failures.repeated(1.0)) == "b: damaged again"
    assert failures.usable(everyone, 0.999 + FAILURE_S) == [without]
    assert failures.usable(everyone, 1.0 + FAILURE_S) == [everyone] and failures.repeated(1.0 + FAILURE_S) is None
    failures.note(B, 3, 800, EngineError("long after"), 1.0 + FAILURE_S)
    assert failures.usable(everyone, 1.0 + FAILURE_S) == [without, everyone], "counted from one again"


@pytest.mark.parametrize("error", [RefusedError("too much"), EngineError("the engine ran out of memory; lend less")])
def test_want_of_room_makes_the_share_smaller_each_time(error):
    everyone, failures = household(1000, 1000), DeviceFailures(A)
    failures.note(B, 1, 800, error, 0.0)
    (less, rest) = failures.usable(everyone, 0.0)
    assert less[B].free_bytes == 600 and less[A] == everyone[A] and rest == everyone
    failures.note(B, 2, 600, error, 0.0)
    (least,) = failures.usable(everyone, 0.0)
    assert least[B].free_bytes == 450
    (little,) = failures.usable({**everyone, B: replace(everyone[B], free_bytes=10)}, 0.0)
    assert little[B].free_bytes == 10, "no more than is free"


def test_the_source_is_never_left_out_but_may_get_less():
    everyone, failures = household(1000, 1000), DeviceFailures(A)
    for epoch in (1, 2):
        failures.note(A, epoch, 800, UnavailableError("it cannot compute this"), 0.0)
    assert failures.usable(everyone, 0.0) == [everyone]
    failures.note(A, 3, 800, RefusedError("too much"), 0.0)
    (less,) = failures.usable(everyone, 0.0)
    assert less[A].free_bytes == 600


def test_the_last_of_several_failures_is_the_one_that_is_told():
    everyone, failures = household(1000, 1000, 1000), DeviceFailures(A)
    for now, device in enumerate((B, C)):
        for epoch in (1, 2):
            failures.note(device, epoch, 800, EngineError(device[0]), float(now))
    assert str(failures.repeated(2.0)) == "c" and failures.usable(everyone, 2.0) == [{A: everyone[A]}]
    assert str(failures.repeated(FAILURE_S + 0.5)) == "c"


# ---- done ----


@pytest.mark.parametrize(
    "error", [EngineError("the processor cannot do it"), ModelError("tensor x is damaged"), UnavailableError("no way")]
)
async def test_a_device_that_fails_is_avoided_by_the_next_plan(houses, error):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    (bad,) = used(a) - {"a"}
    await a.coordinator.stop("m")
    house[bad].engine.fail, before = error, loads(house, bad)
    await a.coordinator.run(RunOptions("m"), quiet)
    assert used(a) == {"a", "b", "c"} - {bad} and loads(house, bad) == before + 1


async def test_a_device_with_less_room_than_it_promised_gets_less(houses):
    house = houses([5, 5, 5], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    others = used(a) - {"a"}
    await a.coordinator.stop("m")
    for letter in "bc":
        house[letter].engine.most = 2 * BLOCK + 2000
    await a.coordinator.run(RunOptions("m"), quiet)
    assert used(a) == {"a", "b", "c"} and others
    assert all(house[letter].engine.held <= house[letter].engine.most for letter in "bc")


async def test_the_only_plan_is_not_tried_for_ever_and_the_reason_is_the_devices(houses):
    house = houses([3, 3, 3], m=8)
    a, b = house["a"], house["b"]
    await a.coordinator.run(RunOptions("m"), quiet)
    before = loads(house, "b")
    b.engine.fail = UnavailableError("the processor is on fire")
    b.engine.clear()
    b.worker.engine_lost("the engine crashed (SIGILL)")
    await house.until(lambda: view(a).state == "waiting" and "on fire" in view(a).reason)
    assert view(a).reason == "device-b: the processor is on fire"
    await house.until(lambda: loads(house, "b") == before + 2)  # the crash of what served does not count
    states, changed = [], a.changed
    a.changed = lambda: (states.append(view(a).state), changed())
    a.coordinator.stir("memory was freed")
    await house.until(lambda: "planning" in states and states[-1] == "waiting")
    a.changed = changed
    assert loads(house, "b") == before + 2 and "on fire" in view(a).reason


async def test_an_engine_that_is_starting_again_is_held_against_nobody(houses):
    house = houses([3, 3, 3], m=8)
    a, b = house["a"], house["b"]
    await a.coordinator.run(RunOptions("m"), quiet)
    before = loads(house, "b")
    b.engine.fail = EngineDownError("the engine is not running (crashed)")
    b.engine.clear()
    b.worker.engine_lost("killed")
    for tries in (1, 2, 3):
        a.coordinator.stir("memory was freed")
        await house.until(lambda tries=tries: loads(house, "b") >= before + tries)
    b.engine.fail = None
    a.coordinator.stir("memory was freed")
    await house.until(lambda: view(a).state == "serving")
    assert "b" in used(a)


async def test_a_broken_link_is_held_against_nobody(houses):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    (other,) = used(a) - {"a"}
    for _ in range(3):
        epoch = view(a).epoch
        a.coordinator.hear(house[other].me, Trouble(view(a).deployment, epoch, "reset by peer"))
        await house.until(lambda epoch=epoch: view(a).state == "serving" and view(a).epoch > epoch)
        assert used(a) == {"a", other}


async def test_a_device_that_refuses_though_it_has_room_is_avoided(houses):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    (bad,) = used(a) - {"a"}
    await a.coordinator.stop("m")
    answer = house[bad].worker.answer

    async def refuse(sender, question):
        if isinstance(question, Reserve):
            return Answer(0, "RefusedError", "256 promises are given already", house[bad].ledger.free_bytes)
        return await answer(sender, question)

    house[bad].worker.answer = refuse
    await asyncio.wait_for(a.coordinator.run(RunOptions("m"), quiet), 20)
    assert used(a) == {"a", "b", "c"} - {bad}


async def test_trouble_of_an_earlier_epoch_or_of_a_stranger_is_none(houses):
    house = houses([4, 6, 6], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    (other,) = used(a) - {"a"}
    (unused,) = {"b", "c"} - {other}
    first = view(a)
    a.coordinator.hear(house[other].me, Trouble(first.deployment, first.epoch, "reset by peer"))
    await house.until(lambda: view(a).state == "serving" and view(a).epoch > first.epoch)
    deployment = a.coordinator._of(first.deployment)
    now = view(a).epoch
    for letter, epoch in ((other, first.epoch), (other, now + 1), (unused, now)):
        a.coordinator.hear(house[letter].me, Trouble(first.deployment, epoch, "the engine died", engine_died=True))
    await asyncio.sleep(0)
    assert view(a).epoch == now and view(a).state == "serving"
    assert len(deployment._search._failures.usable(a.candidates(), 0.0)) == 1, "and it is held against nobody"


async def test_of_two_alarms_at_once_the_first_is_the_reason_and_one_plan_answers_both(houses):
    house = houses([3, 3, 3], m=8)
    a = house["a"]
    await a.coordinator.run(RunOptions("m"), quiet)
    epoch, reasons = view(a).epoch, []
    changed = a.changed
    a.changed = lambda: (reasons.append(view(a).reason), changed())
    for letter in "bc":
        a.coordinator.hear(house[letter].me, Trouble(view(a).deployment, epoch, f"link of {letter} lost"))
    await house.until(lambda: view(a).state == "serving" and view(a).epoch > epoch)
    a.changed = changed
    assert view(a).epoch == epoch + 1 and set(filter(None, reasons)) == {"device-b: link of b lost"}


async def test_trouble_at_the_moment_when_all_is_connected_is_not_lost(houses):
    house = houses([4, 6, 6], m=8)
    a, ask = house["a"], house["a"].ask

    async def asking(device, question, timeout_s):
        answer = await ask(device, question, timeout_s)
        if isinstance(question, Activate) and device == a.me and question.epoch == 1:  # the last to be activated
            a.coordinator.hear(a.me, Trouble(question.deployment, 1, "the engine died", engine_died=True))
        return answer

    a.ask = asking
    await asyncio.wait_for(a.coordinator.run(RunOptions("m"), quiet), 20)
    assert view(a).state == "serving" and view(a).epoch == 2


async def test_trouble_that_comes_while_a_plan_is_given_up_does_not_end_the_next(houses):
    house = houses([3, 3, 3], m=8)
    a, b, ask = house["a"], house["b"], house["a"].ask
    b.engine.gate.clear()
    late = []

    async def asking(device, question, timeout_s):
        if isinstance(question, Release) and not late:
            late.append(Trouble(question.deployment, question.epoch, "reset by peer"))
            a.coordinator.hear(house["c"].me, late[0])
        return await ask(device, question, timeout_s)

    a.ask = asking
    running = asyncio.ensure_future(a.coordinator.run(RunOptions("m"), quiet))
    await asyncio.wait_for(b.engine.loading.wait(), 10)
    a.coordinator.hear(b.me, Trouble(view(a).deployment, 1, "reset by peer"))
    await asyncio.wait_for(running, 20)
    assert late and view(a).epoch == 2


async def test_progress_counts_for_its_epoch_and_never_falls(houses):
    house = houses([3, 3, 3], m=8)
    a, b = house["a"], house["b"]
    b.engine.gate.clear()
    running = asyncio.ensure_future(a.coordinator.run(RunOptions("m"), quiet))
    await asyncio.wait_for(b.engine.loading.wait(), 10)
    await house.until(lambda: house["a"].engine.held and house["c"].engine.held)
    deployment = view(a).deployment

    def after(epoch, phase, done):
        a.coordinator.hear(b.me, Progress(deployment, epoch, phase, done, 100))
        return a.coordinator._of(deployment).report._shares[b.me]

    before = after(1, "load", 0)
    assert before >= progress_report.FETCH_SHARE > after(0, "load", 100) - 0.1 and after(2, "load", 100) == before
    further = after(1, "load", 50)
    assert further > before and after(1, "load", 20) == further and after(1, "fetch", 100) == further
    assert after(1, "load", 500) == 1.0
    b.engine.gate.set()
    await asyncio.wait_for(running, 20)


async def test_plans_that_are_refused_are_tried_so_often_and_no_more(houses, monkeypatch):
    house, tried = houses([9], m=4), []

    async def refused(*_):
        tried.append(1)
        raise RefusedError("not now")

    monkeypatch.setattr(EpochNegotiation, "establish", refused)
    monkeypatch.setattr(pacing, "CONTENTION_S", 0.0)
    with pytest.raises(RefusedError, match="not now"):
        await house["a"].coordinator.run(RunOptions("m"), quiet)
    assert len(tried) == pacing.MAX_ATTEMPTS


# ---- what a new plan keeps ----


def test_a_context_that_is_served_stays_and_slots_give_way_instead():
    assert list(sizes(RunOptions("m"), 8192, 1024)) == [(4, 2048), (4, 1024), (2, 1024), (1, 1024)]
    assert list(sizes(RunOptions("m"), 8192, 2048)) == [(4, 2048), (2, 2048), (1, 2048)]
    assert list(sizes(RunOptions("m"), 8192, 100))[-1] == (1, 512)
    assert list(sizes(RunOptions("m", slots=3), 8192, 1024)) == [(3, 2048), (3, 1024)]
    assert list(sizes(RunOptions("m", context=700), 8192, 2048)) == [(4, 700), (2, 700), (1, 700)]


def thirsty():
    """A model of four blocks whose keys and values take 100 bytes a token and block."""
    model = inspected("m", 4, 4096)
    layers = tuple(replace(layer, kv_bytes_per_token=100 * (layer.kind == "block")) for layer in model.profile.layers)
    return replace(model, profile=replace(model.profile, layers=layers))


@pytest.mark.parametrize(
    ("lent", "got", "words"),
    [
        ((4.4, 8, 4.4), (2048, 2), "2 answers at once instead of 4: "),
        ((3.8, 8, 2.4), (512, 2), "a context of 512 tokens instead of 2048 and 2 answers at once instead of 4: "),
    ],
)
async def test_when_a_device_leaves_the_context_stays_if_it_can_and_else_it_is_said(houses, lent, got, words):
    house = houses(lent, m=thirsty())
    a, told = house["a"], []
    await a.coordinator.run(RunOptions("m"), quiet)
    a.coordinator._of(view(a).deployment).report.watchers.append(told.append)
    assert view(a).reason == "" and a.coordinator.served()[0].context == 2048
    await house.vanish("b")
    await house.until(lambda: view(a).state == "serving" and "b" not in used(a))
    submitted = a.coordinator._of(view(a).deployment).blueprint.workload
    assert (submitted.context, submitted.sequences) == got and view(a).reason.startswith(words)
    assert any(line.message.startswith(words) for line in told) and told[-1].state == "serving"
    epoch = view(a).epoch
    a.coordinator.hear(house["c"].me, Trouble(view(a).deployment, epoch, "reset by peer"))
    await house.until(lambda: view(a).state == "serving" and view(a).epoch > epoch)
    assert view(a).reason.startswith(words), "it is still less than it was at first"
    await house.come_back("b")
    house["c"].engine.clear()
    house["c"].worker.engine_lost("the engine was killed")
    await house.until(lambda: view(a).state == "serving" and not view(a).reason)
    assert a.coordinator.served()[0].context == 2048
