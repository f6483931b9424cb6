"""The runtime with a backend that blocks and fails on purpose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from peerllm.engine.base import Progress
from peerllm.engine.messages import (
    Cancel,
    Configured,
    Connect,
    Done,
    Failed,
    Inspect,
    LayersTimed,
    LoadProgress,
    LoadStage,
    Measure,
    Measured,
    QueryLoad,
    Switch,
    TimeLayers,
    Tokens,
    Trust,
    Trusted,
    Unload,
)
from peerllm.engine.process import runtime
from peerllm.engine.process.engine_line import MemoryChannel
from peerllm.errors import EngineError, LinkError
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.identity import load_or_create
from peerllm.transport.links.data_plane import DataPlane
from peerllm.transport.links.link import Link
from tests.engine.fakes import DEPLOYMENT, Broke, FakeBackend, FakeShard, engine, expected, stage

pytestmark = pytest.mark.timeout(60)
OTHER = "cd" * 16


async def test_many_sequences_over_few_slots(tmp_path: Path) -> None:
    backend = FakeBackend()
    async with engine(tmp_path, backend) as line:
        assert await line.ask(stage(line.request(), slots=8, micro_batch=3)) == Done(2)
        for sequence in range(8):
            line.submit(sequence, range(sequence, sequence * 9 + 1), 30 + sequence)
        for sequence in range(8):
            ids, end = await line.finished(sequence)
            assert ids == expected(range(sequence, sequence * 9 + 1), 30 + sequence) and end.finish == "length"
        sizes = {len(batch) for batch in backend.shards[0].batches}
        assert max(sizes) == 3
        assert all(sum(each.length for each in batch) <= 8 for batch in backend.shards[0].batches)
        load = await line.ask(QueryLoad(line.request()))
        assert load.stages == ((DEPLOYMENT, 0, 0),) and load.measured[f"{DEPLOYMENT}/0"] > 0


async def test_loading_does_not_hold_up_steps(tmp_path: Path) -> None:
    backend, go = FakeBackend(), threading.Event()
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request()))
        backend.before_load = lambda spec, progress: go.wait(20) and None
        request = line.request()
        line.channel.send(stage(request, OTHER))
        line.submit(1, [1, 2, 3], 50)
        assert (await line.finished(1))[0] == expected([1, 2, 3], 50)
        assert not any(getattr(m, "request", None) == request for m in line.heard)
        go.set()
        assert await line.until(lambda m: m == Done(request))


async def test_unloading_while_loading_ends_the_load(tmp_path: Path) -> None:
    backend, go, begun = FakeBackend(), threading.Event(), threading.Event()

    def slow(spec: LoadStage, progress: Progress) -> None:
        begun.set()
        go.wait(20)
        progress(1, 2)

    backend.before_load = slow
    async with engine(tmp_path, backend) as line:
        requests = [line.request(), line.request()]
        for number, request in enumerate(requests):
            line.channel.send(stage(request, stage=number, stages=2))
        await asyncio.to_thread(begun.wait, 20)
        assert isinstance(await line.ask(Unload(line.request(), DEPLOYMENT)), Done)
        go.set()
        for request in requests:
            failed = await line.until(lambda m, request=request: getattr(m, "request", None) == request)
            assert isinstance(failed, Failed) and failed.kind == "RefusedError" and "stopped" in failed.reason
        assert not backend.shards
        backend.before_load = lambda spec, progress: None
        assert isinstance(await line.ask(stage(line.request())), Done)
        assert (await line.ask(QueryLoad(line.request()))).stages == ((DEPLOYMENT, 0, 0),)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (MemoryError(), "EngineError", "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "EngineError", "out of memory"),
        (KeyError("model.layers\n.0"), "EngineError", "KeyError"),
        (OSError(2, "No such file"), "EngineError", "No such file"),
        (RecursionError("x" * 5000), "EngineError", "RecursionError"),
    ],
)
async def test_what_a_load_dies_of_is_one_line(tmp_path: Path, error: Exception, kind: str, words: str) -> None:
    backend = FakeBackend()

    def fail(spec: LoadStage, progress: Progress) -> None:
        raise error

    backend.before_load = fail
    async with engine(tmp_path, backend) as line:
        failed = await line.ask(stage(line.request()))
        assert isinstance(failed, Failed) and failed.kind == kind and words in failed.reason
        assert "\n" not in failed.reason and len(failed.reason) < 400
        backend.before_load = lambda spec, progress: None
        assert isinstance(await line.ask(stage(line.request())), Done)


@pytest.mark.parametrize("at", ["before_load", "before_forward"])
async def test_an_accelerator_that_broke_ends_the_engine(tmp_path: Path, at: str) -> None:
    """Nothing is computed there any more by this process: its daemon starts another."""
    backend = FakeBackend()

    def fail(*_: object) -> None:
        raise Broke("CUDA error: an illegal memory access was encountered")

    setattr(backend, at, fail)
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request()))
        if at == "before_forward":
            line.submit(1, (1, 2), 3)
        assert line.serving is not None
        with pytest.raises(EngineError, match="illegal memory access"):
            await asyncio.wait_for(asyncio.shield(line.serving), 10)


async def test_layers_are_timed_again_after_a_load_that_failed(tmp_path: Path) -> None:
    backend = FakeBackend()

    def fail(spec: LoadStage, progress: Progress) -> None:
        raise EngineError("damaged")

    backend.before_load = fail
    async with engine(tmp_path, backend) as line:
        assert isinstance(await line.ask(stage(line.request())), Failed)
        assert isinstance(await line.ask(TimeLayers(line.request(), "{}", "float32", 1 << 30)), LayersTimed)


async def test_layers_are_not_timed_while_an_answer_is_computed(tmp_path: Path) -> None:
    backend, begun, go = FakeBackend(), threading.Event(), threading.Event()

    def between(check: Callable[[], None]) -> None:
        check()
        begun.set()
        assert go.wait(20)
        check()

    backend.between_passes = between
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request()))
        request = line.request()
        line.channel.send(TimeLayers(request, "{}", "float32", 1 << 30))
        assert await asyncio.to_thread(begun.wait, 20)
        line.submit(1, [1], 1)
        await line.finished(1)
        go.set()
        failed = await line.until(lambda m: getattr(m, "request", None) == request)
        assert isinstance(failed, Failed) and failed.kind == "UnavailableError"


@pytest.mark.parametrize("over", [0, 1])
async def test_a_daemon_that_does_not_read_counts_as_gone(monkeypatch: pytest.MonkeyPatch, over: int) -> None:
    monkeypatch.setattr(runtime, "MAX_UNSENT", 3)
    ours, theirs = MemoryChannel.pair()
    running = runtime.Engine(theirs, FakeBackend())
    for _ in range(3 + over):
        running.tell(Done(1))  # nothing is sent before the loop has its turn
    serving = asyncio.create_task(running.run())
    for _ in range(3):
        assert await ours.receive() == Done(1)
    if over:
        with pytest.raises(EngineError, match="does not read"):
            await asyncio.wait_for(serving, 10)
    else:
        ours.close()
        await asyncio.wait_for(serving, 10)
    await running.close()


async def test_epochs_have_links_of_their_own_until_they_are_unloaded(tmp_path: Path) -> None:
    peer = load_or_create(tmp_path / "peer")
    plane = DataPlane(peer, ("127.0.0.1",), 0)
    await plane.start()
    try:
        async with engine(tmp_path / "me", FakeBackend()) as line:
            me = load_or_create(tmp_path / "me")
            port = next(m for m in line.heard if isinstance(m, Configured)).port
            await plane.set_trusted([me.certificate_pem])
            line.channel.send(Trust((Trusted(peer.device, peer.certificate_pem),)))

            async def load(epoch: int) -> Any:
                return await line.ask(
                    stage(line.request(), epoch=epoch, stage=1, stages=2, upstream=peer.device, head_device=peer.device)
                )

            async def dial(epoch: int) -> Link:
                return await plane.connect(me.device, me.certificate_pem, ("127.0.0.1",), port, DEPLOYMENT, epoch, 1)

            assert isinstance(await load(1), Done)
            before = await dial(1)
            assert isinstance(await load(2), Done)
            now = await dial(2)
            assert not before.closed and not now.closed
            assert isinstance(await line.ask(Unload(line.request(), DEPLOYMENT, 1)), Done)
            await asyncio.wait_for(before.wait_closed(), 20)
            with pytest.raises(LinkError):
                await dial(1)
            refused = await load(1)
            assert isinstance(refused, Failed) and "is past" in refused.reason
            assert not now.closed
            now.close()
            await now.wait_closed()
    finally:
        await plane.close()


async def test_an_engine_holds_several_stages_of_one_epoch(tmp_path: Path) -> None:
    async with engine(tmp_path, FakeBackend()) as line:
        for place in (0, 1, 2):
            assert isinstance(await line.ask(stage(line.request(), stage=place, stages=3)), Done)
        refused = await line.ask(stage(line.request(), stage=1, stages=3))
        assert isinstance(refused, Failed) and "loaded already" in refused.reason
        held = await line.ask(QueryLoad(line.request()))
        assert held.stages == tuple((DEPLOYMENT, place, 0) for place in (0, 1, 2))


async def test_progress_is_throttled_and_complete(tmp_path: Path) -> None:
    backend = FakeBackend()

    def steps(spec: LoadStage, progress: Progress) -> None:
        for done in range(1, 10_001):
            progress(done, 10_000)

    backend.before_load = steps
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request()))
        told = [m for m in line.heard if isinstance(m, LoadProgress)]
        assert 1 <= len(told) < 50 and told[-1].done_bytes == told[-1].total_bytes == 10_000


async def test_an_exception_in_a_batch_ends_its_sequences_only(tmp_path: Path) -> None:
    backend = FakeBackend()
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request(), micro_batch=1))

        def fail(shard: FakeShard, runs: Sequence[TokenRun]) -> None:
            if runs[0].position == 10:
                raise MemoryError

        backend.before_forward = fail
        line.submit(1, [1] * 4, 50)
        line.submit(2, [2] * 12, 50)  # chunks at 0 and 8: never a each at 10
        ids, end = await line.finished(1)
        assert len(ids) == 7 and end.finish == "error" and "out of memory" in end.error and "stage 0" in end.error
        assert (await line.finished(2))[0] == expected([2] * 12, 50)
        assert (await line.ask(QueryLoad(line.request()))).stages == ((DEPLOYMENT, 0, 0),)


async def test_prompts_are_computed_in_the_chunks_that_they_are_cut_into(tmp_path: Path) -> None:
    backend = FakeBackend()
    lengths: list[int] = []
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request(), cuts=((1, 8), (9, 3), (12, 4))))
        backend.before_forward = lambda shard, runs: lengths.extend(each.length for each in runs)
        for number, prompt in enumerate((8, 9, 12), 1):
            line.submit(number, [number] * prompt, 1)
            assert (await line.finished(number))[0] == expected([number] * prompt, 1)
    assert lengths == [8, 3, 3, 3, 4, 4, 4]


async def test_a_long_prompt_is_served_beside_an_endless_answer(tmp_path: Path) -> None:
    async with engine(tmp_path, FakeBackend()) as line:
        await line.ask(stage(line.request()))
        line.submit(1, [1], 900_000)
        await line.until(lambda m: isinstance(m, Tokens) and m.start >= 10)
        line.submit(2, [3] * 400, 3)
        assert (await line.finished(2))[0] == expected([3] * 400, 3)
        line.channel.send(Cancel(DEPLOYMENT, 1))
        assert (await line.finished(1))[1].finish == "cancelled"
        line.channel.send(Cancel(DEPLOYMENT, 1))
        line.channel.send(Cancel(OTHER, 1))
        line.submit(1, [5], 2)  # a number that nothing is left of
        await line.until(lambda m: isinstance(m, Tokens) and m.finish == "length" and m.sequence == 1)


async def test_a_later_epoch_uses_what_is_loaded_and_takes_the_answers_over(tmp_path: Path) -> None:
    backend = FakeBackend()
    async with engine(tmp_path, backend) as line:
        await line.ask(stage(line.request(), epoch=2))
        line.submit(1, [1], 400)
        await line.until(lambda m: isinstance(m, Tokens))
        assert (await line.ask(stage(line.request(), epoch=1))).kind == "RefusedError"
        assert (await line.ask(stage(line.request(), epoch=2))).kind == "RefusedError"
        assert isinstance(await line.ask(stage(line.request(), epoch=3)), Done)
        assert isinstance(await line.ask(Connect(line.request(), DEPLOYMENT, 2)), Done)
        assert isinstance(await line.ask(Connect(line.request(), DEPLOYMENT, 3)), Done)
        assert (await line.ask(Switch(line.request(), DEPLOYMENT, 4))).kind == "RefusedError"
        assert (await line.ask(Switch(line.request(), OTHER, 3))).kind == "RefusedError"
        assert isinstance(await line.ask(Switch(line.request(), DEPLOYMENT, 3)), Done)
        assert isinstance(await line.ask(Unload(line.request(), DEPLOYMENT, 2)), Done)
        assert (await line.ask(Connect(line.request(), DEPLOYMENT, 2))).kind == "RefusedError"
        ids, end = await line.finished(1)
        assert ids == expected([1], 400) and end.finish == "length"
        held = await line.ask(QueryLoad(line.request()))
        assert len(backend.shards) == 1 and held.held_bytes == {DEPLOYMENT: 1100} and held.replayed_tokens == 0
        line.submit(2, [7], 5)
        assert (await line.finished(2))[0] == expected([7], 5)
        assert isinstance(await line.ask(Unload(line.request(), DEPLOYMENT, 3)), Done)
        assert backend.shards[0].closed


async def test_other_questions(tmp_path: Path) -> None:
    async with engine(tmp_path, FakeBackend()) as line:
        failed = await line.ask(Inspect(line.request(), "/nowhere", "auto"))
        assert failed.reason == "ZeroDivisionError: a damaged model"
        request = line.request()
        assert await line.ask(Measure(request)) == Measured(request, {}, {})
        assert isinstance(await line.ask(Unload(line.request(), OTHER)), Done)
        assert isinstance(await line.ask(Connect(line.request(), OTHER, 1)), Failed)
