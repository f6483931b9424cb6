"""What goes wrong for one sequence, one load or one message ends that alone, and somebody hears of it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerllm.engine.base import Draw, Tensor
from peerllm.engine.messages import (
    Cancel,
    Connect,
    Done,
    EngineLoad,
    Failed,
    Hop,
    LinkLost,
    LoadStage,
    QueryLoad,
    Submit,
    Switch,
    Tokens,
    Trust,
    Trusted,
    Unload,
)
from peerllm.engine.process.compute import Arrived, Compute, Event, Linked, Loaded, Lost, start
from peerllm.engine.process.data_links import DataLinks
from peerllm.engine.process.recorder import Recorder
from peerllm.engine.sampler import SeededSampler
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.epoch_ring import StageKey
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.schedule.source_sequences import SourceSequences
from peerllm.engine.wire.parcels import Opened, Released, TokenBatch, from_frame, to_frame
from peerllm.errors import EngineError, LinkError
from peerllm.transport.frames.frame import Frame
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.links.channels import STEP, Delivery
from peerllm.transport.links.data_plane import DataPlane
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, VOCABULARY, FakeBackend, FakeShard, Line, engine, expected, stage
from tests.engine.runs import in_slot

pytestmark = pytest.mark.timeout(60)
PEER = "d" * 64
TOLD_S = 20.0  # until a thread has told what it must


# ---- one sequence of a batch -----------------------------------------------------------------------------------------


async def together(line: Line, backend: FakeBackend, spoilt: int, words: str) -> None:
    """Four sequences in one batch, of which one fails on the way; the others' tokens are as ever."""
    assert isinstance(await line.ask(stage(line.request(), micro_batches=1)), Done)
    for sequence in range(4):
        line.channel.send(Submit(DEPLOYMENT, sequence, (sequence, 1), 30, (), Sampling(seed=sequence)))
    ids, end = await line.finished(spoilt)
    assert 0 < len(ids) < 30 and end.finish == "error" and words in end.error and "\n" not in end.error
    for sequence in {0, 1, 2, 3} - {spoilt}:
        assert (await line.finished(sequence))[0] == expected((sequence, 1), 30)
    batches = [[run.sequence for run in batch] for batch in backend.shards[0].batches]
    assert any(spoilt in batch and len(batch) > 1 for batch in batches), "it was in a batch with others"
    assert spoilt not in batches[-1]
    assert (await line.ask(QueryLoad(line.request()))).stages == ((DEPLOYMENT, 0, 0),)


async def test_logits_that_are_no_numbers_end_their_sequence_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = FakeShard.forward

    def spoil(shard: FakeShard, inputs: Tensor, runs: Sequence[TokenRun]) -> Tensor:
        logits = forward(shard, inputs, runs)
        for row, run in enumerate(run for run in runs if run.sample):
            if run.sequence == 2 and run.position >= 12:
                logits[row] = np.nan
        return logits

    monkeypatch.setattr(FakeShard, "forward", spoil)
    backend = FakeBackend()
    backend.sampler = SeededSampler()  # type: ignore[method-assign]
    async with engine(tmp_path, backend) as line:
        await together(line, backend, 2, "no finite numbers")


@pytest.mark.parametrize("wrong", [VOCABULARY, 10**9, -2])
async def test_an_id_that_the_model_lacks_ends_its_sequence_alone(tmp_path: Path, wrong: int) -> None:
    class Backend(FakeBackend):
        def sampler(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
            drawn = super().sampler(logits, draws)
            return [
                wrong if one.sampling.seed == 1 and len(one.answer) == 9 else token
                for one, token in zip(draws, drawn, strict=True)
            ]

    backend = Backend()
    async with engine(tmp_path, backend) as line:
        await together(line, backend, 1, f"0 to {VOCABULARY - 1}")


@pytest.mark.parametrize(("prompt", "good"), [((0, VOCABULARY - 1), True), ((5, VOCABULARY), False), ((-1, 5), False)])
async def test_a_prompt_holds_only_ids_that_the_model_has(tmp_path: Path, prompt: tuple[int, ...], good: bool) -> None:
    async with engine(tmp_path, FakeBackend()) as line:
        await line.ask(stage(line.request()))
        line.submit(1, prompt, 2)
        ids, end = await line.finished(1)
        assert (ids, end.finish) == ((expected(prompt, 2), "length") if good else ([], "error"))


# ---- handing on ------------------------------------------------------------------------------------------------------


async def test_a_fault_while_handing_on_ends_these_sequences_and_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came_back = SourceSequences.came_back

    def faulty(source: SourceSequences, run: TokenRun, *more: Any) -> Any:
        if run.sequence == 1 and run.position >= 8:
            raise ZeroDivisionError("a fault\nof ours")
        return came_back(source, run, *more)

    monkeypatch.setattr(SourceSequences, "came_back", faulty)
    async with engine(tmp_path, FakeBackend()) as line:
        await line.ask(stage(line.request(), micro_batch=1))
        line.submit(1, [1] * 4, 50)
        line.submit(2, [2] * 4, 50)
        ids, end = await line.finished(1)
        assert len(ids) == 5 and end.finish == "error" and "ZeroDivisionError: a fault of ours" in end.error
        assert (await line.finished(2))[0] == expected([2] * 4, 50)
        line.submit(3, [3] * 4, 3)
        assert (await line.finished(3))[0] == expected([3] * 4, 3)


class Outlet:
    """The way to the next stage, which takes what `fails` lets through."""

    device = PEER

    def __init__(self, fails: Callable[[Any], bool] = lambda parcel: False) -> None:
        self.sent: list[Any] = []
        self.round: Callable[[Released], None] = lambda parcel: None  # back to the source
        self._fails = fails

    def send(self, frame: Frame) -> None:
        for parcel in from_frame(frame):
            if self._fails(parcel):
                raise TypeError("not to be sent")
            self.sent.append(parcel)
            if isinstance(parcel, Released):
                self.round(parcel)


@pytest.mark.parametrize(("what", "lost"), [(TokenBatch, False), (TokenBatch | Released, True), (Opened, True)])
def test_what_cannot_be_sent_ends_its_sequence(what: Any, lost: bool) -> None:
    """Where not even the release can be sent, the link counts as lost: the daemon hears of it, and sequences wait."""
    told: list[Any] = []
    heard = threading.Condition()

    def tell(message: Any) -> None:
        with heard:
            told.append(message)
            heard.notify_all()

    def ended(sequence: int) -> Tokens | None:
        return next((m for m in told if isinstance(m, Tokens) and m.sequence == sequence and m.finish), None)

    def until(wanted: Callable[[], object]) -> None:
        with heard:
            assert heard.wait_for(wanted, TOLD_S), told

    outlet = Outlet(lambda parcel: isinstance(parcel, what))
    died: list[BaseException | None] = []
    compute = Compute(FakeBackend(), tell, Recorder())
    outlet.round = lambda parcel: compute._deployments[DEPLOYMENT].arrived(1, 2, [parcel])
    thread = start(compute, died.append)
    spec = stage(1, stages=2, downstream=Hop(PEER, (), 1, 1), head_device=PEER)
    compute.inbox.put(loaded(spec))
    compute.inbox.put(Linked(2, DEPLOYMENT, 1, {0: outlet}))  # type: ignore[dict-item]
    for sequence in (1, 2):
        compute.inbox.put(Submit(DEPLOYMENT, sequence, (1,), 5, (), Sampling()))
        if lost:
            continue
        until(lambda sequence=sequence: ended(sequence))
        end = ended(sequence)
        assert end is not None and end.finish == "error" and "\n" not in end.error
    if lost:
        until(lambda: any(isinstance(m, LinkLost) for m in told))
        for sequence in (1, 2):
            compute.inbox.put(Cancel(DEPLOYMENT, sequence))
            until(lambda sequence=sequence: ended(sequence))
            assert ended(sequence).finish == "cancelled"
    compute.inbox.put(QueryLoad(3))
    until(lambda: any(isinstance(m, EngineLoad) for m in told))
    assert next(m for m in told if isinstance(m, EngineLoad)).stages == ((DEPLOYMENT, 0, 0),)
    assert [m.device for m in told if isinstance(m, LinkLost)] == [PEER] * lost
    compute.inbox.close()
    thread.join(TOLD_S)
    assert died == [None]


def loaded(spec: LoadStage) -> Loaded:
    held = HeldShard.of(spec, FakeShard(FakeBackend(), spec))
    return Loaded(spec, (held,), (held,))


class Cut(Outlet):
    """A link that is gone."""

    def send(self, frame: Frame) -> None:
        raise LinkError("cut")


def here(told: list[Any], *indexes: int, stages: int) -> tuple[LocalDeployment, Scheduler[StageKey]]:
    """These stages of a plan, each linked to the next one if that lies elsewhere."""
    schedule: Scheduler[StageKey] = Scheduler()
    specs = [
        stage(1, stage=index, stages=stages, downstream=None if index + 1 in indexes else Hop(PEER, (), 1, index + 1))
        for index in indexes
    ]
    deployment = LocalDeployment(DEPLOYMENT, schedule, told.append)
    for spec in specs:
        held = HeldShard.of(spec, FakeShard(FakeBackend(), spec))
        deployment.loaded(LoadedStage(spec, [held], lambda logits, draws: []))
    return deployment, schedule


def test_what_is_under_way_when_a_link_is_found_cut_counts_no_more() -> None:
    """One run of a batch does not follow, its release finds the link cut: sequences wait for new links, and go on."""
    told: list[Any] = []
    deployment, schedule = here(told, 0, 1, stages=3)
    outlet = Outlet()
    deployment.linked(1, {1: outlet})  # type: ignore[dict-item]
    for sequence in (1, 2):
        deployment.submit(Submit(DEPLOYMENT, sequence, (1,), 5, (), Sampling()))
    slots = {parcel.sequence: parcel.slot for parcel in outlet.sent}
    deployment.rings[1].linked({1: Cut()})  # type: ignore[dict-item]
    runs = [TokenRun(1, slots[1], 0, 1, True), TokenRun(2, slots[2], 9, 1, True)]
    deployment.arrived(1, 1, [TokenBatch(runs, np.zeros((2, 4), np.float32))])
    assert [type(m) for m in told] == [LinkLost] and told[0].epoch == 1
    source = deployment.feed.sequences
    assert source.running == (1, 2) and not source.prompts_under_way
    outlet.sent.clear()
    deployment.linked(1, {1: outlet})  # type: ignore[dict-item]
    assert [(type(parcel), parcel.sequence, parcel.position) for parcel in outlet.sent] == [
        (Opened, 1, 0),
        (Opened, 2, 0),
    ]
    assert schedule.waiting((DEPLOYMENT, 1, 0)) == 2 and schedule.waiting((DEPLOYMENT, 1, 1)) == 0


def test_a_link_that_is_lost_again_is_told_again() -> None:
    told: list[Any] = []
    deployment, _ = here(told, 1, stages=3)
    for _ in range(2):
        deployment.linked(1, {1: Cut()})  # type: ignore[dict-item]
        for _ in range(2):
            deployment.arrived(1, 1, [Released(1, 0)])
    assert [m.device for m in told if isinstance(m, LinkLost)] == [PEER, PEER]


def test_events_of_a_past_epoch_change_nothing() -> None:
    told: list[Any] = []
    compute = Compute(FakeBackend(), told.append, Recorder())
    hop = Hop(PEER, (), 1, 1)
    for epoch in (1, 2):
        spec = stage(epoch, epoch=epoch, stages=2, downstream=hop, head_device=PEER)
        compute._handle(loaded(spec))
        compute._handle(Linked(3, DEPLOYMENT, epoch, {0: Outlet()}))  # type: ignore[dict-item]
    compute._handle(Switch(3, DEPLOYMENT, 2))
    compute._handle(Submit(DEPLOYMENT, 1, (1,), 5, (), Sampling()))

    def events(epoch: int) -> list[Event]:
        failed = Released(1, 0, "failed")
        delivery = Delivery(STEP, to_frame(failed, DEPLOYMENT, epoch, 2), 0, lambda _: told.append("handled"))
        return [
            Arrived(delivery, [failed]),
            Lost(DEPLOYMENT, epoch, PEER, None, "gone"),
            Linked(epoch, DEPLOYMENT, epoch, {}),
        ]

    told.clear()
    for event in events(1):
        compute._handle(event)
    assert told == ["handled", LinkLost(DEPLOYMENT, PEER, "gone", 1), Done(1)], "the sequence runs in the other"
    compute._handle(Unload(5, DEPLOYMENT, 1))
    told.clear()
    for event in events(1):
        compute._handle(event)
    assert told == ["handled", Failed(1, "RefusedError", "epoch 1 is not loaded here any more")]
    told.clear()
    for event in events(2):
        compute._handle(event)
    assert [type(one) for one in told] == [str, Tokens, LinkLost, Done] and told[1].error == "failed"


# ---- loading and unloading -------------------------------------------------------------------------------------------


async def test_a_stage_that_was_unloaded_before_it_was_handed_over_is_expected_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 2
    monkeypatch.setattr(sys.modules[DataPlane.__module__], "MAX_EXPECTED", most)
    backend = FakeBackend()
    begun, go = threading.Event(), threading.Event()

    def slow(spec: LoadStage, progress: Any) -> None:
        begun.set()
        assert go.wait(TOLD_S)

    def second(request: int, deployment: str) -> LoadStage:
        return stage(request, deployment, stage=1, stages=2, upstream=PEER)

    async with engine(tmp_path, backend) as line:
        backend.before_load = slow
        for number in range(most + 1):
            begun.clear(), go.clear()
            request, deployment = line.request(), f"{number:032x}"
            line.channel.send(second(request, deployment))
            assert await asyncio.to_thread(begun.wait, TOLD_S)
            assert isinstance(await line.ask(Unload(line.request(), deployment)), Done)
            go.set()
            failed = await line.until(lambda m, request=request: getattr(m, "request", None) == request)
            assert isinstance(failed, Failed) and "stopped while it was loading" in failed.reason
        assert all(shard.closed for shard in backend.shards)
        for number in range(most):
            assert isinstance(await line.ask(second(line.request(), f"{number:032x}")), Done)
        refused = await line.ask(second(line.request(), DEPLOYMENT))
        assert isinstance(refused, Failed) and "expects 2 links" in refused.reason, "the bound stands"


async def test_an_unload_that_takes_long_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = asyncio.Event()

    async def forget(links: DataLinks, deployment: str, *epoch: int) -> None:
        await ends.wait()

    async with engine(tmp_path, FakeBackend()) as line:
        await line.ask(stage(line.request()))
        monkeypatch.setattr(DataLinks, "forget", forget)
        assert isinstance(await line.ask(Unload(line.request(), DEPLOYMENT)), Done)
        other = "cd" * 16
        assert isinstance(await line.ask(stage(line.request(), other)), Done)
        line.submit(1, [1, 2], 3, other)
        assert (await line.finished(1))[0] == expected([1, 2], 3)
        assert isinstance(await line.ask(Connect(line.request(), other, 1)), Done)
        ends.set()


async def test_certificates_that_cannot_be_taken_end_the_engine(tmp_path: Path) -> None:
    """Whoever was removed with them must not stay linked; the daemon starts another engine."""
    async with engine(tmp_path, FakeBackend()) as line:
        line.channel.send(Trust((Trusted(PEER, "no certificate"),)))
        assert line.serving is not None
        with pytest.raises(EngineError, match="certificates cannot be taken"):
            await asyncio.wait_for(asyncio.shield(line.serving), TOLD_S)


# ---- how much may wait -----------------------------------------------------------------------------------------------


def test_a_stage_lets_the_window_and_a_step_a_slot_wait_and_not_a_token_more() -> None:
    most = 2 * 3 * 8 + 4  # chunks under way, and a step for each slot
    deployment, schedule = here([], 1, stages=3)
    outlet = Outlet()
    deployment.linked(1, {1: outlet})  # type: ignore[dict-item]

    def comes(slot: int, position: int, length: int) -> None:
        rows = np.zeros((length, 4), np.float32)
        deployment.arrived(1, 1, [TokenBatch([in_slot(slot, position, length)], rows)])

    for slot in (1, 2):
        deployment.arrived(1, 1, [Opened(slot, slot, Sampling())])
    comes(1, 0, most - 1)
    comes(2, 0, 2)
    assert isinstance(outlet.sent[-1], Released) and f"more than {most} tokens wait" in outlet.sent[-1].reason
    assert schedule.waiting((DEPLOYMENT, 1, 1)) == most - 1
    comes(1, most - 1, 1)
    assert len(outlet.sent) == 3 and schedule.waiting((DEPLOYMENT, 1, 1)) == most, "so many may wait"
    comes(1, most, 1)
    assert outlet.sent[-1].sequence == 1 and schedule.waiting((DEPLOYMENT, 1, 1)) == 0
