"""Layer times: what is believed, what the planner goes by, who is measured when, and what is kept."""

from __future__ import annotations

import asyncio
import functools
import math
from dataclasses import replace

import pytest

from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import Answer, Ask, Control, Profile
from peerllm.daemon.decide.device_profiles import (
    Candidate,
    MeasuredLayers,
    checked,
    device_profile,
    estimated,
    kinds_of,
    machine_contention,
    shown,
    slower_than_estimated,
)
from peerllm.daemon.engine_link import machine, profile_cache
from peerllm.daemon.engine_link.profile_cache import MAX_ENTRIES, ProfileFile, layer_key
from peerllm.daemon.engine_link.profiler import MAX_MEASURING, Profiler
from peerllm.daemon.facade import RunOptions
from peerllm.daemon.status.status import deployments_of
from peerllm.engine.messages import LayersTimed, TimeLayers
from peerllm.errors import BadInputError, EngineError, InfeasibleError, OverloadedError, UnavailableError
from peerllm.types import Workload
from tests.daemon.house import BLOCK, CONFIG, LAYER_MS, hello, inspected

KINDS = ("pass", "embedding", "block", "head", "attention:block")
QUESTION = Profile(CONFIG, "float32", KINDS, measure=True)


class Engine:
    """Answers TimeLayers when `gate` is open."""

    def __init__(self):
        self.asked, self.layer_ms = [], LAYER_MS
        self.begun, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()

    def next_request(self):
        return len(self.asked)

    async def ask(self, message, timeout_s):
        self.asked.append(message)
        assert isinstance(message, TimeLayers)
        self.begun.set()
        await self.gate.wait()
        return LayersTimed(message.request, self.layer_ms, {})


def profiler(engine, folder, computed_by="this processor"):
    return Profiler(engine, lambda: 5, computed_by, folder / "profiles.json")


# ---- what is believed, and what the planner goes by ----------------------------------------------------------------


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((1, math.nan),),
        ((1, math.inf),),
        ((1, 0.0),),
        ((1, -1.0),),
        ((1, 1e9),),
        ((0, 1.0),),
        ((2, 1.0), (1, 1.0)),
        ((1, 1.0), (1, 1.0)),
        ((1 << 40, 1.0),),
        tuple((n, 1.0) for n in range(1, 99)),
    ],
)
def test_what_cannot_be_true_counts_as_not_measured(points):
    told = {"block": points, "head": ((1, 2.0), (8, 1.0)), "unasked": ((1, 1.0),)}
    assert checked(told, KINDS) == {"head": ((1, 2.0), (8, 1.0))}


LATENCY, THROUGHPUT = (Workload(128, 128, objective=objective) for objective in ("latency", "throughput"))


def test_the_planner_stretches_times_where_all_devices_compute_and_estimates_what_is_missing():
    model = inspected("m", 4).profile
    alone = {"pass": ((1, 0.4),), "block": ((1, 1.0), (128, 9.0)), "head": ((1, 0.5),)}
    candidate = Candidate("a" * 64, hello("a", BLOCK), 9, timing=MeasuredLayers(alone, 1.5, "measured"))
    times = device_profile(candidate, model, LATENCY, "float32", devices=2).layer_ms
    assert dict(times["block"]) == pytest.approx({1: 1.0 + 2 * 0.4 / 4, 128: 9.2})  # two passes over four blocks
    assert times["head"] == ((1, 0.5),)
    guess = estimated(candidate, model, "float32")["embedding"]
    assert times["embedding"] == guess
    times = device_profile(candidate, model, THROUGHPUT, "float32", devices=2).layer_ms
    assert dict(times["block"]) == pytest.approx({1: 1.5 * 1.2, 128: 1.5 * 9.2})
    assert dict(times["embedding"]) == pytest.approx({n: 1.5 * ms for n, ms in guess})
    assert set(times) == {layer.kind for layer in model.layers}
    assert kinds_of(model) == KINDS


@pytest.mark.parametrize(
    ("prompt", "answer", "window", "step", "chunk"),
    [
        (512, 1024, None, 1024, 192),  # the prompt and half of the answer; half of what the last chunk has before it
        (128, 2, None, 129, 0),  # a prompt of one chunk
        (100, 2, None, 101, 0),
        (512, 1024, 100, 100, 100),  # a window's layer sees no further
    ],
)
def test_attention_costs_what_stands_before_a_token(prompt, answer, window, step, chunk):
    model = inspected("m", 2).profile
    model = replace(model, layers=tuple(replace(layer, kv_window_tokens=window) for layer in model.layers))
    times = {"block": ((1, 1.0), (4, 2.0), (128, 9.0)), "attention:block": ((1, 1.024), (128, 10.24))}
    candidate = Candidate("a" * 64, hello("a", BLOCK), 9, timing=MeasuredLayers(times))
    found = dict(device_profile(candidate, model, Workload(prompt, answer), "float32").layer_ms["block"])
    each = {1: 1.0 + 0.001 * step, 4: 2.0 + 0.004 * step, 128: 9.0 + 0.01 * chunk}
    assert found == pytest.approx(each)


@pytest.mark.parametrize(
    ("machines", "threads", "processors", "longer"),
    [
        ("xxx", (1, 1, 1), 2, (1.5, 1.5, 1.5)),
        ("xx", (1, 1), 2, (1.0, 1.0)),
        ("xx", (2, 1), 2, (1.5, 1.5)),
        ("xxy", (2, 2, 2), 2, (2.0, 2.0, 1.0)),
        ("xx", (99, 1), 2, (1.5, 1.5)),  # no device computes with more threads than there are processors
        ("  ", (2, 2), 2, (1.0, 1.0)),  # who knows whether they share a machine
        ("xx", (1, 1), 0, (2.0, 2.0)),
    ],
)
def test_devices_that_share_a_machine_share_its_processors(machines, threads, processors, longer):
    told = [
        replace(hello(name, BLOCK, machine.strip()), threads=count, processors=processors)
        for name, machine, count in zip("abc", machines, threads, strict=False)
    ]
    found = machine_contention([Candidate(one.name * 64, one, 9) for one in told])
    assert tuple(found.values()) == longer


def test_a_guess_beside_measurements_does_not_look_the_fastest():
    model = inspected("m", 4).profile
    guessed = Candidate("a" * 64, hello("a", BLOCK), 9)
    block = estimated(guessed, model, "float32")["block"][0][1]
    timed = [replace(guessed, timing=MeasuredLayers({"block": ((1, factor * block),)})) for factor in (3.0, 5.0, 0.5)]
    assert slower_than_estimated([guessed, *timed], model, "float32") == pytest.approx(3.0)
    assert slower_than_estimated([guessed, timed[2]], model, "float32") == 1.0, "never quicker than estimated"
    assert slower_than_estimated([guessed], model, "float32") == 1.0
    times = device_profile(guessed, model, LATENCY, "float32", slower=3.0).layer_ms
    assert times["block"][0] == (1, pytest.approx(3 * block))


def test_status_tells_times_by_device_and_where_they_come_from():
    model = inspected("m", 4).profile
    bare = Candidate("a" * 64, hello("a", BLOCK), 9)
    told = shown(bare, model, "float32")
    assert told["source"] == "estimated" and told["contention"] == 1.0 and told["alone"]["block"]["1"] > 0
    both = Candidate("a" * 64, hello("a", BLOCK), 9, timing=MeasuredLayers(LAYER_MS, 1.75, "cached"))
    told = shown(both, model, "float32")
    assert told == {
        "alone": {kind: {str(n): ms for n, ms in points} for kind, points in LAYER_MS.items()},
        "contention": 1.75,
        "source": "cached",
    }


def test_the_messages_cross_the_wire():
    for message in (Ask(1, QUESTION), Answer(1, layer_ms=LAYER_MS, cached=True)):
        assert decode(encode(message, Control), Control) == message


def test_a_machine_is_told_by_its_start(tmp_path, monkeypatch):
    file = tmp_path / "boot_id"
    monkeypatch.setattr(machine, "BOOT_ID", file)
    assert machine.fingerprint() == ""
    file.write_text("b593057a-3603\n")
    first = machine.fingerprint()
    assert len(first) == 32 and "b593057a" not in first and machine.fingerprint() == first
    file.write_text("another\n")
    assert machine.fingerprint() != first


# ---- one device's answers --------------------------------------------------------------------------------------------


async def test_measured_once_kept_and_measured_again_when_damaged(tmp_path):
    engine = Engine()
    assert not (await profiler(engine, tmp_path).answer(Profile(CONFIG, "float32", KINDS, measure=False))).layer_ms
    first = await profiler(engine, tmp_path).answer(QUESTION)
    assert first == Answer(0, layer_ms=LAYER_MS) and engine.asked[0].limit_bytes == 5
    again = await profiler(engine, tmp_path).answer(QUESTION)
    assert again == Answer(0, layer_ms=LAYER_MS, cached=True) and len(engine.asked) == 1
    (tmp_path / "profiles.json").write_bytes(b'{"entries": [{"key": 1}]}')
    assert not (await profiler(engine, tmp_path).answer(QUESTION)).cached and len(engine.asked) == 2


@pytest.mark.parametrize("change", ["processor", "config", "dtype", "quantize", "timing"])
async def test_times_hold_only_for_what_they_were_taken_with(tmp_path, monkeypatch, change):
    engine = Engine()
    await profiler(engine, tmp_path).answer(QUESTION)
    values = {"config": "{}", "dtype": "bfloat16", "quantize": "int8"}
    given = {"config": CONFIG, "dtype": "float32", "quantize": ""} | {k: v for k, v in values.items() if k == change}
    other = Profile(given["config"], given["dtype"], KINDS, measure=False, quantize=given["quantize"])
    by = "another processor" if change == "processor" else "this processor"
    if change == "timing":
        monkeypatch.setattr(profile_cache, "TIMED_BY", "another way")
    assert not (await profiler(engine, tmp_path, by).answer(other)).layer_ms


async def test_who_asks_for_the_same_waits_for_the_same_and_the_rest_is_bounded(tmp_path):
    engine = Engine()
    engine.gate.clear()
    mine = profiler(engine, tmp_path)
    asking = [asyncio.ensure_future(mine.answer(QUESTION)) for _ in range(3)]
    asking += [
        asyncio.ensure_future(mine.answer(Profile(f'{{"n": {n}}}', "float32", KINDS, True)))
        for n in range(MAX_MEASURING)
    ]
    with pytest.raises(OverloadedError):
        await asking.pop()
    asking[0].cancel()  # who asked hangs up; the others still get their answer
    engine.gate.set()
    answers = await asyncio.gather(*asking[1:])
    assert all(answer.layer_ms for answer in answers) and len(engine.asked) == MAX_MEASURING
    await mine.close()
    await mine.close()


async def test_closing_ends_what_is_being_measured(tmp_path):
    engine = Engine()
    engine.gate.clear()
    mine = profiler(engine, tmp_path)
    asking = asyncio.ensure_future(mine.answer(QUESTION))
    await asyncio.wait_for(engine.begun.wait(), 10)
    await mine.close()
    with pytest.raises(UnavailableError, match="stopped"):
        await asking


@pytest.mark.parametrize(
    "question",
    [
        Profile("x" * (2 << 20), "float32", KINDS, True),
        Profile(CONFIG, "float32", ("k",) * 100, True),
    ],
)
async def test_questions_out_of_bounds_are_refused(tmp_path, question):
    engine = Engine()
    with pytest.raises(BadInputError):
        await profiler(engine, tmp_path).answer(question)
    assert not engine.asked


def test_the_file_is_bounded_and_the_oldest_go(tmp_path, monkeypatch):
    file = ProfileFile(tmp_path / "profiles.json")
    file.put({f"k{n}": ((1, 1.0),) for n in range(MAX_ENTRIES)})
    file.put({"new": ((1, 2.0),)})
    fresh = ProfileFile(tmp_path / "profiles.json")
    assert fresh.get({"a": "k0", "b": "k1", "c": "new"}) == {"b": ((1, 1.0),), "c": ((1, 2.0),)}
    monkeypatch.setattr(profile_cache, "MAX_FILE_BYTES", 10)
    assert not ProfileFile(tmp_path / "profiles.json").get({"c": "new"})


def test_keys_do_not_run_into_each_other():
    keys = {layer_key("ab", "c", "k", "d"), layer_key("a", "bc", "k", "d"), layer_key("ab", "c", "k", "", "d")}
    assert len(keys | {layer_key("ab", "c", "k", "d", "int8")}) == 4


# ---- a coordinator's rounds ------------------------------------------------------------------------------------------


async def run(house, model, **options):
    told = []
    await house["a"].coordinator.run(RunOptions(model, **options), told.append)
    return told


def timed(house):
    return {d.me[0]: sum(isinstance(m, TimeLayers) for m in d.engine.seen) for d in house.devices.values()}


def profiles(house):
    (found,) = house["a"].coordinator.profiles().values()
    return found


async def test_every_candidate_is_measured_once_and_the_person_sees_it(houses):
    house = houses([3, 3, 3], big=8)
    told = await run(house, "big")
    assert timed(house) == {"a": 1, "b": 1, "c": 1}
    assert {f"measuring device-{letter}" for letter in "abc"} <= {line.message for line in told}
    assert {name: one["source"] for name, one in profiles(house).items()} == {f"device-{x}": "measured" for x in "abc"}
    assert profiles(house)["device-b"]["contention"] == 1.0
    views, peers = house["a"].coordinator.views(), {}
    (entry,) = deployments_of(views, peers, house["a"].name, house["a"].coordinator.profiles())
    assert entry["profiles"] == profiles(house)
    await house["a"].coordinator.stop("big")
    await run(house, "big")
    assert timed(house) == {"a": 1, "b": 1, "c": 1}


async def test_another_coordinator_hears_what_the_device_knows_already(houses):
    house = houses([9, 9], small=4)
    await run(house, "small")
    await house["b"].coordinator.run(RunOptions("small"), lambda _: None)
    assert timed(house) == {"a": 1, "b": 1}
    (found,) = house["b"].coordinator.profiles().values()
    assert {one["source"] for one in found.values()} == {"cached"}


async def test_the_plan_follows_what_was_measured(houses):
    """Alike but for their measured speed: the far faster one gets all that may leave the source."""
    house = houses([9, 9, 9], small=6)
    house["a"].engine.layer_ms = {**LAYER_MS, "block": ((1, 50.0),)}
    house["b"].engine.layer_ms = {**LAYER_MS, "block": ((1, 90.0),)}
    await run(house, "small")
    (view,) = house["a"].coordinator.views()
    held = {stage.device[0]: stage.last_layer - stage.first_layer + 1 for stage in view.stages[:2]}
    assert held == {"a": 2, "c": 5}, "the source keeps what it must"


async def test_devices_of_one_machine_slow_each_other_down_where_all_compute(houses):
    house = houses([3, 3, 3, 3], "xxyx", big=8)
    await run(house, "big", objective="throughput")
    found = {name: one["contention"] for name, one in profiles(house).items()}
    assert found == {"device-a": 1.5, "device-b": 1.5, "device-c": 1.0, "device-d": 1.5}


async def test_devices_of_one_machine_are_measured_by_turns_and_others_at_once(houses):
    house = houses([3, 3, 3, 3], "xxyx", big=8)
    at_work, seen, met = set(), [], asyncio.Event()

    async def timing(letter, message):
        at_work.add(letter)
        seen.append(frozenset(at_work))
        if "c" in at_work and len(at_work) > 1:
            met.set()
        await asyncio.wait_for(met.wait(), 10)  # the other machine's device, beside any of these
        at_work.discard(letter)

    for letter in "abcd":
        house[letter].engine.timing = functools.partial(timing, letter)
    await run(house, "big")
    assert timed(house) == dict.fromkeys("abcd", 1)
    assert max(len(some & set("abd")) for some in seen) == 1


async def test_a_device_that_is_busy_is_estimated_and_not_asked_again_at_once(houses, caplog):
    house = houses([3, 3, 3], "xxx", big=8)
    house["b"].engine.layer_ms = UnavailableError("an answer is being written here")
    await run(house, "big")
    found = profiles(house)
    assert found["device-b"]["source"] == "estimated" and found["device-b"]["alone"]["block"]
    assert found["device-a"]["source"] == "measured"
    assert "device-b was not measured, its speed is estimated for now" in caplog.text
    await house["a"].coordinator.stop("big")
    await run(house, "big")
    assert timed(house)["b"] == 1


async def test_lies_are_not_planned_with(houses, caplog):
    house = houses([3, 3, 3], big=8)
    house["b"].engine.layer_ms = {**LAYER_MS, "block": ((1, math.inf),)}
    await run(house, "big")
    assert "device-b did not time block" in caplog.text
    assert "block" not in profiles(house)["device-b"]["alone"] and profiles(house)["device-b"]["alone"]["head"]


async def test_an_engine_that_fails_does_not_stop_the_plan(houses):
    house = houses([9, 9], small=4)
    house["a"].engine.layer_ms = EngineError("it died")
    await run(house, "small")
    assert profiles(house)["device-a"]["source"] == "estimated"


async def test_a_model_too_large_is_said_before_anyone_is_measured(houses):
    house = houses([3, 3], huge=20)
    with pytest.raises(InfeasibleError):
        await run(house, "huge")
    assert timed(house) == {"a": 0, "b": 0}


async def test_a_device_that_leaves_while_it_is_measured_is_planned_around(houses):
    house = houses([9, 9], small=4)
    begun = asyncio.Event()

    async def never(message):
        begun.set()
        await asyncio.Event().wait()

    house["b"].engine.timing = never
    running = asyncio.ensure_future(run(house, "small"))
    await asyncio.wait_for(begun.wait(), 10)
    await house.vanish("b")
    await asyncio.wait_for(running, 10)
    assert set(profiles(house)) == {"device-a"}


async def test_a_device_that_comes_while_others_are_measured_is_measured_too(houses):
    """Else a guess would stand beside measurements, and look the fastest."""
    house = houses([9, 9], "xy", big=8)
    b = house["b"]
    b.online = False

    async def timing(message):
        b.online = True

    house["a"].engine.timing = timing
    await run(house, "big")
    assert timed(house) == {"a": 1, "b": 1}
    assert {name: found["source"] for name, found in profiles(house).items()} == {
        "device-a": "measured", "device-b": "measured",
    }  # fmt: skip
