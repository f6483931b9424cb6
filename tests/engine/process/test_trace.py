"""What an engine records: nothing unless asked, the right passes, never more than the ring holds."""

from __future__ import annotations

import asyncio
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from peerllm.engine.messages import Record, Recorded, Span, Unload
from peerllm.engine.process.recorder import MAX_PART, MAX_PIECES, MAX_RECORDED, Recorder
from peerllm.errors import RefusedError
from peerllm.transport.frames.frame import Frame, FrameKind
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.links.observer import SentFrame
from tests.engine.engines import WAIT_S, Cut, deploy, devices
from tests.engine.fakes import DEPLOYMENT, FakeBackend, engine, expected, stage
from tests.engine.tiny import make_llama, prompt, reference

pytestmark = pytest.mark.timeout(120)
OTHER = "cd" * 16
RING: Cut = ((0, 0, 1), (1, 2, 3), (0, 4, 5))


def step(sequence: int, position: int = 3) -> TokenRun:
    return TokenRun(sequence, sequence, position, 1, True)


def taken(recorder: Recorder, deployment: str = DEPLOYMENT) -> tuple[list[Span], int]:
    spans, left, lost = recorder.take(deployment)
    found = list(spans)
    while left:
        spans, left, _ = recorder.take(deployment)
        assert 0 < len(spans) <= MAX_PART
        found += spans
    return found, lost


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    recorder = Recorder()
    assert not recorder.on
    recorder.lap("idle")
    with pytest.raises(RefusedError):
        recorder.take(DEPLOYMENT)
    recorder.start(DEPLOYMENT)
    recorder.lap("pass", DEPLOYMENT, 0, [step(1)])
    assert len(taken(recorder)[0]) == 1 and not recorder.on
    recorder.lap("idle")
    recorder.start(DEPLOYMENT)
    assert taken(recorder) == ([], 0), "what was before is not in it"


def test_state_that_is_carried_meanwhile_is_left_out() -> None:
    recorder = Recorder()
    recorder.start(DEPLOYMENT)
    recorder.sent((DEPLOYMENT, "d", 1), 1, SentFrame(FrameKind.KEY_VALUE, (), 9, 0, 0), 0, 0)
    recorder.received("d", Frame(FrameKind.KEY_VALUE, DEPLOYMENT, 1, 1, ()), 1, 9, 0, 0)
    assert taken(recorder) == ([], 0)


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 2500])
def test_the_ring_keeps_the_last(count: int) -> None:
    recorder = Recorder(100)
    recorder.start(OTHER)
    for _ in range(70):
        recorder.lap("idle")
    recorder.start(DEPLOYMENT)
    for sequence in range(count):
        recorder.lap("pass", DEPLOYMENT, 2, [step(sequence)] * (MAX_PIECES + 1))
    spans, lost = taken(recorder)
    assert lost == max(0, count - 100)
    assert [span.pieces[0][0] for span in spans] == list(range(lost, count))
    assert all(len(span.pieces) == MAX_PIECES for span in spans)
    assert all(a.end_ns == b.start_ns for a, b in pairwise(spans)), "laps leave no gap"


def test_large_batches_take_no_more_room() -> None:
    recorder = Recorder(100, pieces=50)
    recorder.start(DEPLOYMENT)
    for sequence in range(30):
        recorder.lap("pass", DEPLOYMENT, 2, [step(sequence)] * 9)
        recorder.lap("idle")
    spans, lost = taken(recorder)
    assert [span.pieces[0][0] for span in spans if span.pieces] == list(range(25, 30))
    assert sum(len(span.pieces) for span in spans) <= 50 and lost + len(spans) == 60


def test_a_long_recording_comes_in_parts() -> None:
    recorder = Recorder()
    recorder.start(DEPLOYMENT)
    for sequence in range(2 * MAX_PART + 5):
        recorder.lap("pass", DEPLOYMENT, 2, [step(sequence)])
    assert [span.pieces[0][0] for span in taken(recorder)[0]] == list(range(2 * MAX_PART + 5))
    with pytest.raises(RefusedError):
        recorder.take(DEPLOYMENT)


def test_a_coordinator_sees_that_another_model_computes_and_not_more() -> None:
    recorder = Recorder()
    for one in (DEPLOYMENT, OTHER):
        recorder.start(one)
    recorder.lap("pass", OTHER, 7, [step(1)])
    recorder.lap("hand on", OTHER)
    recorder.lap("idle")
    recorder.lap("pass", DEPLOYMENT, 2, [step(2)])
    spans, _ = taken(recorder)
    assert [(span.name, span.stage, span.pieces) for span in spans] == [
        ("another model", -1, ()),
        ("another model", -1, ()),
        ("idle", -1, ()),
        ("pass", 2, ((2, 3, 1, 1),)),
    ]
    assert recorder.on, "the other goes on"
    names = [span.name for span in taken(recorder, OTHER)[0]]
    assert names == ["pass", "hand on", "idle", "another model"]


def test_bounds_in_number_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    for number in range(MAX_RECORDED):
        recorder.start(f"{number:032x}")
    with pytest.raises(RefusedError):
        recorder.start(DEPLOYMENT)
    recorder.start(f"{1:032x}")
    for number in range(MAX_RECORDED):
        recorder.forget(f"{number:032x}")
    assert not recorder.on
    monkeypatch.setattr("peerllm.engine.process.recorder.MAX_SECONDS", 0)
    recorder.start(DEPLOYMENT)
    recorder.lap("idle")
    assert not recorder.on, "nobody ended it in time"
    assert taken(recorder) == ([], 0)


def test_two_threads_fill_it_while_a_third_takes() -> None:
    recorder = Recorder(1000)
    go = threading.Barrier(3)

    def fill() -> None:
        go.wait()
        for number in range(3000):
            recorder.sent((DEPLOYMENT, "d" * 64, 1), number, SentFrame(FrameKind.RELEASE, (), 1, 0, 0), number, number)

    threads = [threading.Thread(target=fill) for _ in range(2)]
    recorder.start(DEPLOYMENT)
    for thread in threads:
        thread.start()
    go.wait()
    for _ in range(20):
        spans, lost = taken(recorder)
        assert len(spans) <= 1000 and lost <= 6000
        recorder.start(DEPLOYMENT)
    for thread in threads:
        thread.join()


async def test_passes_are_recorded_as_they_were(tmp_path: Path) -> None:
    backend = FakeBackend()
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request(), slots=4, micro_batch=2))
        line.submit(1, [1, 2, 3], 5)
        await line.finished(1)
        before = len(backend.shards[0].batches)
        started = await line.ask(Record(line.request(), DEPLOYMENT, "start"))
        line.submit(2, range(9), 6)  # two chunks
        line.submit(3, [5], 6)
        ids = [(await line.finished(sequence))[0] for sequence in (2, 3)]
        assert ids == [expected(range(9), 6), expected([5], 6)]
        found = await line.ask(Record(line.request(), DEPLOYMENT, "take"))
        assert isinstance(found, Recorded) and not found.left and not found.lost
        passes = [span for span in found.spans if span.name == "pass"]
        batches = backend.shards[0].batches[before:]
        assert [[p[1:] for p in span.pieces] for span in passes] == [
            [(s.position, s.length, int(s.sample)) for s in batch] for batch in batches
        ]
        assert {sequence for span in passes for sequence, *_ in span.pieces} == {2, 3}
        assert {span.stage for span in passes} == {0}
        assert {span.kind for span in passes} == {"prompt", "step"}
        for span in passes:
            steps = all(length == 1 and sample for _, _, length, sample in span.pieces)
            assert (span.kind == "step") == steps
        laps = [span for span in found.spans if span.name in ("idle", "take in", "pass", "hand on")]
        assert laps[0].start_ns >= started.clock_ns - 10**9 and laps[-1].end_ns <= found.clock_ns
        assert all(a.end_ns == b.start_ns for a, b in pairwise(laps))
        await line.ask(Record(line.request(), DEPLOYMENT, "start"))
        await line.ask(Unload(line.request(), DEPLOYMENT))
        gone = await line.ask(Record(line.request(), DEPLOYMENT, "take"))
        assert gone.kind == "RefusedError"


async def test_frames_are_the_same_at_both_ends(tmp_path: Path) -> None:
    async with devices(2, tmp_path, in_process=True) as made:
        model = make_llama(tmp_path / "model")
        deployed = await deploy(made, model, RING)
        assert await deployed.generate(prompt(3), 4) == reference(model, prompt(3), 4), "numbers count from the first"

        async def ask(want: str) -> list[Recorded]:
            asks = (one.host.ask(Record(one.host.next_request(), deployed.id, want), WAIT_S) for one in made)
            return await asyncio.gather(*asks)

        await ask("start")
        assert await deployed.generate(prompt(11), 9) == reference(model, prompt(11), 9)
        one, two = (found.spans for found in await ask("take"))
        for mine, theirs, device in ((one, two, made[1].id), (two, one, made[0].id)):
            sent = {span.frame: span for span in mine if span.name == "send"}
            came = {span.frame: span for span in theirs if span.name == "receive"}
            assert sent and set(came) <= set(sent), "the last may be on its way"
            assert len(set(sent) - set(came)) <= 2
            for number, arrival in came.items():
                span = sent[number]
                assert span.device == device and min(sent) > 1
                told = (span.stage, span.kind, span.nbytes, span.pieces)
                assert told == (arrival.stage, arrival.kind, arrival.nbytes, arrival.pieces)
                assert arrival.start_ns >= span.start_ns and span.queued_ns >= 0, "one process, one clock"
        assert {span.stage for span in one if span.name == "pass"} == {0, 2}
        assert {span.stage for span in two if span.name == "pass"} == {1}
        assert {span.kind for span in two if span.name == "receive"} >= {"open", "activation"}
