"""A coordinator collects what its devices recorded, and a trace shows no more than it may and all that it must."""

from __future__ import annotations

import json
import time

import pytest

from peerllm.daemon.control_messages import Trace
from peerllm.daemon.decide.clock_alignment import Alignment, Reading
from peerllm.daemon.deployment.figures import tracing
from peerllm.daemon.facade import RunOptions
from peerllm.daemon.status import chrome_trace
from peerllm.engine.messages import Record, Span
from peerllm.errors import NotFoundError, RefusedError
from peerllm.types import Stage
from tests import traces
from tests.daemon.house import quiet

MS = 10**6  # ns
A, B = "a" * 64, "b" * 64


@pytest.fixture
def house(houses):
    return houses([4, 4], big=6)


async def served(house):
    coordinator = house["a"].coordinator
    await coordinator.run(RunOptions("big"), quiet)
    return coordinator, coordinator.views()[0].deployment


def lap(at, length, name="pass", **more):
    return Span(name, at, at + length, **more)


async def test_clocks_far_apart_are_put_beside_each_other(house):
    coordinator, deployment = await served(house)
    b = house["b"].engine
    b.clock_ahead_ns = 10**15
    number = await coordinator.figures.record("big")
    asked = [message for message in b.seen if isinstance(message, Record)]
    assert [one.want for one in asked[-2:]] == ["clock", "start"]
    now = time.perf_counter_ns()
    b.recorded[deployment] = [
        tuple(lap(b.clock_ahead_ns + now + 10 * i, 5, "idle") for i in part) for part in (range(3), range(3, 5))
    ]
    house["a"].engine.recorded[deployment] = [(lap(now, 50, "idle"),)]
    while time.perf_counter_ns() < now + 1000:
        pass
    trace = json.loads(await coordinator.figures.recorded("big", number))
    traces.check(trace, ["device-a", "device-b"])
    (mine,), theirs = traces.of(trace, "device-a"), traces.of(trace, "device-b")
    assert len(theirs) == 5, "both parts"
    clock = trace["otherData"]["devices"]["device-b"]
    assert abs(clock["offset_us"] - b.clock_ahead_ns / 1000) <= clock["uncertainty_us"] + 1
    doubt = clock["uncertainty_us"] + trace["otherData"]["devices"]["device-a"]["uncertainty_us"]
    assert abs(theirs[0]["ts"] - mine["ts"]) <= doubt + 0.01


async def test_only_its_coordinator_records_a_deployment(house):
    coordinator, deployment = await served(house)
    b = house["b"]
    for want in ("clock", "start", "take"):
        for worker in (house["a"].worker, b.worker):
            answer = await worker.answer(B, Trace(deployment, want))
            assert answer.error == "RefusedError" and answer.recorded is None
        answer = await b.worker.answer(A, Trace("0" * 32, want))
        assert answer.error == "RefusedError"
    assert not any(isinstance(message, Record) for message in b.engine.seen), "the engine is not even asked"
    with pytest.raises(NotFoundError):
        await b.coordinator.figures.record("big")
    with pytest.raises(RefusedError, match="another"):
        await coordinator.figures.recorded("big", 99)


async def test_the_newest_recording_counts(house):
    coordinator, _ = await served(house)
    first = await coordinator.figures.record("big")
    second = await coordinator.figures.record("big")
    with pytest.raises(RefusedError, match="another"):
        await coordinator.figures.recorded("big", first)
    assert json.loads(await coordinator.figures.recorded("big", second))["otherData"]["model"] == "big"
    with pytest.raises(RefusedError):
        await coordinator.figures.recorded("big", second)


async def test_a_device_that_tells_nothing_is_named_and_all_is_an_error(house):
    coordinator, deployment = await served(house)
    number = await coordinator.figures.record("big")
    house["b"].engine.recorded[deployment] = RefusedError("nothing is recorded here")
    trace = json.loads(await coordinator.figures.recorded("big", number))
    assert set(trace["otherData"]["missing"]) == {"device-b"}
    traces.check(trace, ["device-a"])
    number = await coordinator.figures.record("big")
    house["a"].engine.recorded[deployment] = RefusedError("nothing is recorded here")
    with pytest.raises(RefusedError, match="nothing"):
        await coordinator.figures.recorded("big", number)


async def test_a_device_that_tells_without_end_is_cut_short(house, monkeypatch):
    coordinator, deployment = await served(house)
    monkeypatch.setattr(tracing, "MAX_SPANS", 40)
    monkeypatch.setattr(tracing, "MAX_PIECES", 400)
    for pieces, most in ((1, 40 + 9), (100, 4 + 10)):
        number = await coordinator.figures.record("big")
        now = time.perf_counter_ns()
        spans = tuple(lap(now + i, 0, stage=1, pieces=((1, i, 1, 1),) * pieces) for i in range(10))
        house["b"].engine.recorded[deployment] = [spans] * 10_000
        trace = json.loads(await coordinator.figures.recorded("big", number))
        assert 0 < len(traces.passes(trace, "device-b")) <= most
        assert len(house["b"].engine.recorded[deployment]) > 9_000


# ---- the file -------------------------------------------------------------------------------------------------------

STAGES = (Stage(A, 0, 2), Stage(B, 3, 5))
NAMES = {A: "laptop", B: "jetson"}


def same_clock(device, spans, ahead=0):
    before, after = Reading(0, ahead + MS, 2 * MS), Reading(98 * MS, ahead + 99 * MS, 100 * MS)
    return chrome_trace.DeviceTrace(NAMES[device], Alignment(before, after), spans)


def trace_of(mine, theirs, ahead=0):
    told = {A: same_clock(A, mine), B: same_clock(B, theirs, ahead)}
    found = chrome_trace.encode(chrome_trace.Recording("m", "d" * 32, STAGES, NAMES, told, 2 * MS, 98 * MS))
    return json.loads(found)


PIECES = ((1, 7, 1, 1), (2, 3, 1, 1))


def lapped(ahead):
    """One step of two sequences: a's pass, its frame to b, b's pass, the token back, a's next pass."""
    frame = {"frame": 4, "nbytes": 900, "pieces": PIECES}
    mine = [
        lap(10 * MS, 5 * MS, stage=0, kind="step", pieces=PIECES),
        lap(16 * MS, MS, "send", stage=1, kind="activation", device=B, queued_ns=MS, **frame),
        lap(34 * MS, MS, "receive", stage=2, kind="token", device=B, **frame),
        lap(36 * MS, 5 * MS, stage=0, kind="step", pieces=((1, 8, 1, 1), (2, 4, 1, 1))),
    ]
    theirs = [
        lap(ahead + 20 * MS, MS, "receive", stage=1, kind="activation", device=A, **frame),
        lap(ahead + 23 * MS, 5 * MS, stage=1, kind="step", pieces=PIECES),
        lap(ahead + 30 * MS, 3 * MS, "send", stage=2, kind="token", device=A, queued_ns=0, **frame),
    ]
    return mine, theirs


def test_a_step_can_be_followed_round():
    trace = trace_of(*lapped(5 * 10**12), ahead=5 * 10**12)
    traces.check(trace, ["laptop", "jetson"])
    first, second = traces.passes(trace, "laptop")
    assert (first["name"], first["ts"], first["dur"]) == ("stage 0: step", 8000, 5000)
    assert first["args"] == {"stage": 0, "layers": "0-2", "sequences": [1, 2], "positions": [7, 3], "tokens": 2}
    (sent,) = traces.of(trace, "laptop", "send to jetson")
    assert sent["args"]["bytes"] == 900 and sent["args"]["queued_us"] == 1000
    waits = {(one["name"], one["ph"], one["ts"]) for one in trace["traceEvents"] if one["ph"] in "be"}
    assert {
        ("waiting to be sent", "b", 13000), ("waiting to be sent", "e", 14000),
        ("hop to jetson", "b", 14000), ("hop to jetson", "e", 18000),
        ("waiting for stage 1", "b", 19000), ("waiting for stage 1", "e", 21000),
        ("waiting for stage 0", "b", 33000), ("waiting for stage 0", "e", 34000),
    } <= waits  # fmt: skip
    arrows = [(one["id"], one["ph"], one["pid"], one["ts"]) for one in trace["traceEvents"] if one["ph"] in "stf"]
    assert arrows.count((1, "f", 2, 21000)) == 1 and (2, "f", 1, second["ts"]) in arrows


def test_clocks_that_err_show_an_arrival_before_its_sending_and_nothing_breaks():
    trace = trace_of(*lapped(0), ahead=9 * MS)  # b is shown 9 ms early
    clocks = trace["otherData"]["devices"]
    assert clocks["jetson"]["uncertainty_us"] == clocks["laptop"]["uncertainty_us"] == 1000
    with pytest.raises(AssertionError):
        traces.check(trace, ["laptop", "jetson"])  # the check is one that can fail


@pytest.mark.parametrize(
    "lie",
    [
        lap(-5, 1), lap(200 * MS, 1), lap(50 * MS, -10), lap(50 * MS, 10**18),
        lap(50 * MS, 1, stage=2, kind="step"), lap(50 * MS, 1, stage=-1), lap(50 * MS, 1, "send", stage=9, device=A),
        lap(50 * MS, 1, "send", stage=1, device="c" * 64), lap(50 * MS, 1, "receive", stage=1),
        lap(50 * MS, 1, stage=1, pieces=((1, 2**63, 2**63, 1),) * 2), lap(50 * MS, 1, stage=1, pieces=PIECES * 200),
        lap(50 * MS, 1, "send", stage=1, device=A, queued_ns=-1),
    ],
)  # fmt: skip
def test_what_cannot_be_is_not_shown(lie):
    trace = trace_of([], [lie])
    assert not [one for one in trace["traceEvents"] if one["ph"] != "M"]


def test_links_with_one_device_are_told_apart():
    spans = [lap(50 * MS + i, 3, "send", stage=stage, device=A, frame=1) for i, stage in enumerate((1, 2))]
    trace = trace_of([], spans)
    traces.check(trace, ["laptop", "jetson"])
    assert len(traces.of(trace, "jetson", "send to laptop, for stage 1")) == 1
    assert len(traces.of(trace, "jetson", "send to laptop, for the source")) == 1
