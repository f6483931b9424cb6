"""Engines that are cancelled, killed, frozen and lied to; as processes of their own where their end matters."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from peerllm.engine.messages import Connect, Submit, Tokens, Trust, Trusted, Unload
from peerllm.engine.process import data_links
from peerllm.engine.wire.parcels import Opened, Released, to_frame
from peerllm.errors import LinkError, RefusedError
from peerllm.transport.frames.frame import Frame, FrameKind, NamedTensor
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.identity import load_or_create
from peerllm.transport.links.data_plane import DataPlane
from peerllm.transport.links.link import Link
from tests.engine.engines import GREEDY, WAIT_S, Cut, deploy, devices, inspect, redeploy, retrust, stage_specs
from tests.engine.engines import Deployed as DeployedHere
from tests.engine.tiny import make_llama, prompt, reference

pytestmark = pytest.mark.timeout(240)

THREE: Cut = ((0, 0, 1), (1, 2, 3), (2, 4, 5))
RING: Cut = ((0, 0, 1), (1, 2, 3), (0, 4, 5))
LONG = 4000  # tokens: never reached in a test


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


async def test_cancel_frees_the_slots_on_every_stage(model: Path, tmp_path: Path) -> None:
    async with devices(3, tmp_path, in_process=True) as made:
        deployed = await deploy(made, model, THREE, context=4096)
        running = [deployed.submit(prompt(20, n), LONG) for n in range(4)]
        for sequence in running:
            await deployed.some(sequence, 3)
        assert await deployed.slots_used() == {(0, 0): 4, (1, 1): 4, (2, 2): 4}
        refused = deployed.submit(prompt(5), 5)
        _, end = await deployed.finished(refused)
        assert end.finish == "error" and "slots are taken" in end.error
        for sequence in running[:3]:
            deployed.cancel(sequence)
        for sequence in running[:3]:
            assert (await deployed.finished(sequence))[1].finish == "cancelled"
        ids, again = prompt(9, 9), deployed.submit(prompt(9, 9), 10)  # in a slot that was just given back
        assert (await deployed.finished(again))[0] == reference(model, ids, 10)
        for _ in range(20):  # cancelled while its prompt is still on its way
            deployed.cancel(deployed.submit(prompt(500, 7), LONG))
        assert (await deployed.finished(deployed.submit(ids, 10)))[0] == reference(model, ids, 10)
        before = len(made[0].tokens(running[3])[0])
        await deployed.some(running[3], before + 3)
        deployed.cancel(running[3])
        await deployed.until_free()
        for sequence in running:
            ends = [e for e in made[0].events if isinstance(e, Tokens) and e.sequence == sequence and e.finish]
            assert len(ends) == 1


async def test_what_ends_an_answer(model: Path, tmp_path: Path) -> None:
    async with devices(2, tmp_path, in_process=True) as made:
        deployed = await deploy(made, model, ((0, 0, 1), (1, 2, 5)), context=32)
        ids = prompt(10, 10)
        expected = reference(model, ids, 30)
        stop = expected[6]
        stopped, end = await deployed.finished(deployed.submit(ids, 30, stop_ids=[stop]))
        assert stopped == expected[: expected.index(stop)] and end.finish == "stop"
        full, end = await deployed.finished(deployed.submit(ids, 100))
        assert full == expected[: 32 - 10 + 1] and end.finish == "length"
        one, end = await deployed.finished(deployed.submit(prompt(32), 100))
        assert len(one) == 1 and end.finish == "length"
        for bad, message in (
            (deployed.submit(prompt(33), 5), "1 to 32 tokens"),
            (deployed.submit([], 5), "1 to 32 tokens"),
            (deployed.submit(ids, 0), "at least 1 token"),
            (deployed.submit([5, 10**6], 5), "token ids"),
            (deployed.submit([5, -1], 5), "token ids"),
        ):
            nothing, end = await deployed.finished(bad)
            assert nothing == [] and end.finish == "error" and message in end.error and "\n" not in end.error
        assert await deployed.generate(ids, 9) == expected[:9]
        made[1].host.tell(Submit(deployed.id, 77, tuple(ids), 5, (), GREEDY))
        await made[1].until(lambda: made[1].tokens(77)[1] is not None)
        assert "holds the embedding" in made[1].tokens(77)[1].error
        made[0].host.tell(Submit("ab" * 16, 78, tuple(ids), 5, (), GREEDY))
        await made[0].until(lambda: made[0].tokens(78)[1] is not None)
        await deployed.until_free()


async def test_a_killed_engine_starts_again_and_its_answers_go_on(model: Path, tmp_path: Path) -> None:
    async with devices(3, tmp_path) as made:
        deployed = await deploy(made, model, THREE, context=256)
        running = [deployed.submit(prompt(20, n), 200) for n in range(3)]
        for sequence in running:
            await deployed.some(sequence, 5)
        waiting = asyncio.ensure_future(made[1].host.ask(Connect(made[1].host.next_request(), "00" * 16, 1), WAIT_S))
        with pytest.raises(RefusedError):
            await waiting
        old = made[1].host.pid
        assert old is not None
        os.kill(old, signal.SIGKILL)
        await made[1].until(lambda: bool(made[1].lost))
        assert "SIGKILL" in made[1].lost[0]
        for number in (0, 2):
            device = made[number]
            await device.until(lambda device=device: any(one.device == made[1].id for one in device.links_lost()), 5)
        late = deployed.submit(prompt(3), 5)
        deployed.cancel(running[2])
        assert (await deployed.finished(running[2], 5))[1].finish == "cancelled", "that is still done"
        await made[1].until(lambda: len(made[1].ready) == 2)
        assert made[1].host.pid not in (None, old) and made[1].host.state == "running"
        deployed.epoch += 1
        await redeploy(deployed, THREE, context=256)
        await deployed.switch()
        for number, sequence in enumerate(running[:2]):
            assert (await deployed.finished(sequence))[0] == reference(model, prompt(20, number), 200)
        assert (await deployed.finished(late))[0] == reference(model, prompt(3), 5)
        await deployed.unload(1)
        assert await deployed.generate(prompt(20, 1), 8) == reference(model, prompt(20, 1), 8)
        await deployed.until_free()


async def test_a_break_far_from_the_source_reaches_it(model: Path, tmp_path: Path) -> None:
    async with devices(4, tmp_path) as made:
        cut: Cut = ((0, 0, 1), (1, 2, 2), (2, 3, 3), (3, 4, 4), (0, 5, 5))
        deployed = await deploy(made, model, cut, context=256)
        running = deployed.submit(prompt(20), 200)
        await deployed.some(running, 3)
        assert made[2].host.pid is not None
        os.kill(made[2].host.pid, signal.SIGKILL)
        await made[1].until(lambda: bool(made[1].links_lost()))
        await made[3].until(lambda: bool(made[3].links_lost()))
        deployed.epoch += 1  # without the one that died; its layers go to the two beside it
        await redeploy(deployed, ((0, 0, 1), (1, 2, 3), (3, 4, 4), (0, 5, 5)), context=256)
        await deployed.switch()
        assert (await deployed.finished(running))[0] == reference(model, prompt(20), 200)


async def test_a_frozen_engine_that_wakes_up_goes_on(model: Path, tmp_path: Path) -> None:
    async with devices(2, tmp_path) as made:
        deployed = await deploy(made, model, RING, context=256)
        running = deployed.submit(prompt(20), 200)
        await deployed.some(running, 3)
        assert made[1].host.pid is not None
        os.kill(made[1].host.pid, signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutError):
                await deployed.finished(running, timeout_s=3)
        finally:
            os.kill(made[1].host.pid, signal.SIGCONT)
        assert (await deployed.finished(running))[0] == reference(model, prompt(20), 200)
        assert not made[0].links_lost() and not made[1].links_lost()


async def test_unload_ends_sequences_and_gives_memory_back(tmp_path: Path, tmp_path_factory) -> None:
    large = make_llama(tmp_path_factory.mktemp("large"), layers=8, hidden=1024)
    async with devices(1, tmp_path) as made:
        before = (await made[0].load()).resident_bytes
        room = {"context": 20_000, "slots": 1}
        small = await deploy(made, make_llama(tmp_path_factory.mktemp("small")), ((0, 0, 5),), **room)
        aside = small.submit(prompt(5), 19_000)  # longer than the other takes to load, on a busy machine too
        await small.some(aside, 2)
        warm = (await made[0].load()).resident_bytes
        deployed = await deploy(made, large, ((0, 0, 9),), context=4096)
        assert any(p.deployment == deployed.id and p.done_bytes == p.total_bytes for p in made[0].progress())
        loaded = await made[0].load()
        assert loaded.weight_bytes > 200 << 20 and loaded.kv_bytes > 100 << 20
        assert loaded.resident_bytes > warm + loaded.weight_bytes // 2
        assert f"{small.id}/0" in loaded.measured and loaded.measured[f"{small.id}/0"] > 0
        running = deployed.submit(prompt(5), LONG)
        await deployed.some(running, 2)
        await deployed.unload()
        _, end = await deployed.finished(running)
        assert end.finish == "error" and "stopped" in end.error
        after = await made[0].load()
        assert after.weight_bytes < 10 << 20
        assert after.resident_bytes < warm + (60 << 20), (before, warm, loaded.resident_bytes, after.resident_bytes)
        count = len(made[0].tokens(aside)[0])
        await small.some(aside, count + 3)
        await deployed.unload()  # a second time is fine


async def test_removal_from_the_household_cuts_the_links(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_links, "CONNECT_TIMEOUT_S", 0.5)
    async with devices(2, tmp_path, in_process=True) as made:
        deployed = await deploy(made, model, RING, context=4096)
        running = deployed.submit(prompt(20), LONG)
        await deployed.some(running, 3)
        await retrust(made[:1], made[:1])
        await made[0].until(lambda: any("removed" in lost.reason for lost in made[0].links_lost()), 5)
        with pytest.raises(Exception, match="not of this household"):
            await made[0].host.ask(Connect(made[0].host.next_request(), deployed.id, 1), WAIT_S)
        await deployed.unload()
        _, end = await deployed.finished(running, timeout_s=5)
        assert end.finish == "error" and "stopped" in end.error


async def test_a_stage_nobody_expects_is_an_honest_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_links, "CONNECT_TIMEOUT_S", 0.5)
    async with devices(2, tmp_path, in_process=True) as made:
        inspected = await inspect(made[0], model)
        deployed = DeployedHere(made, inspected)
        (device, spec), _ = stage_specs(made, inspected, ((0, 0, 1), (1, 2, 5)), deployed)
        await device.host.ask(spec, WAIT_S)
        with pytest.raises(RefusedError, match="loaded already"):
            await device.host.ask(type(spec)(**{**fields(spec), "request": device.host.next_request()}), WAIT_S)
        started = asyncio.get_running_loop().time()
        with pytest.raises(LinkError):
            await device.host.ask(Connect(device.host.next_request(), deployed.id, 1), WAIT_S)
        assert asyncio.get_running_loop().time() - started >= 0.4
        with pytest.raises(LinkError, match="links"):
            await deployed.switch()
        waits = deployed.submit(prompt(3), 5)
        await deployed.unload()
        assert (await deployed.finished(waits))[1].finish == "error"


def fields(message: object) -> dict[str, object]:
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


HIDDEN = 32


def activation(deployed: DeployedHere, *runs: TokenRun, rows: int | None = None) -> Frame:
    rows = sum(each.length for each in runs) if rows is None else rows
    tensor = NamedTensor.of("hidden", "F32", (rows, HIDDEN), bytes(4 * rows * HIDDEN))
    return Frame(FrameKind.ACTIVATION, deployed.id, 1, 1, runs, (tensor,))


async def test_bad_frames_end_the_link_and_nothing_else(model: Path, tmp_path: Path) -> None:
    liar = load_or_create(tmp_path / "liar")
    async with AsyncExitStack() as stack:
        (victim,) = await stack.enter_async_context(devices(1, tmp_path, in_process=True))
        plane = DataPlane(liar, ("127.0.0.1",), 0)
        await plane.start()
        stack.push_async_callback(plane.close)
        await plane.set_trusted([victim.identity.certificate_pem])
        victim.host.tell(Trust((victim.trust, Trusted(liar.device, liar.certificate_pem))))
        inspected = await inspect(victim, model)
        healthy = await deploy([victim], model, ((0, 0, 5),), context=4096)
        aside = healthy.submit(prompt(5), LONG)
        deployed = DeployedHere([victim], inspected)
        specs = stage_specs([victim, victim], inspected, ((0, 0, 1), (1, 2, 5)), deployed)
        values = fields(specs[1][1]) | {"upstream": liar.device, "downstream": None, "head_device": victim.id}
        await victim.host.ask(type(specs[1][1])(**values), WAIT_S)

        async def link() -> Link:
            pem = victim.identity.certificate_pem
            return await plane.connect(victim.id, pem, victim.hosts, victim.port, deployed.id, 1, 1)

        def opened(sequence: int, slot: int) -> Frame:
            return to_frame(Opened(sequence, slot, GREEDY), deployed.id, 1, 1)

        nan = opened(1, 0)
        nan = Frame(
            nan.kind,
            nan.deployment,
            1,
            1,
            nan.runs,
            (
                NamedTensor.of("sampling", "F64", (1, 7), b"\xff" * 56),
                *nan.tensors[1:],
            ),
        )
        partial, hidden = FrameKind.PARTIAL, FrameKind.ACTIVATION
        cases: list[tuple[Frame, str]] = [
            (activation(deployed, TokenRun(1, 99, 0, 2)), "names a slot the plan does not have"),
            (activation(deployed, TokenRun(1, 0, 60, 8)), "reaches beyond the context"),
            (activation(deployed, TokenRun(1, 0, 0, 2), rows=3), "rows do not match"),
            (activation(deployed, TokenRun(1, 0, 0, 40)), "exceeds limit"),
            (Frame(partial, deployed.id, 1, 1, (TokenRun(1, 0, 0, 1),)), "of a kind not allowed here"),
            (Frame(hidden, deployed.id, 2, 1, (TokenRun(1, 0, 0, 1),)), "of another epoch"),
            (nan, "bad sampling"),
        ]
        for frame, reason in cases:
            lying = await link()
            lying.send(frame)
            await asyncio.wait_for(lying.wait_closed(), WAIT_S)
            assert reason in lying.lost
        await victim.until(lambda: len(victim.links_lost()) > 0, WAIT_S)
        assert cases[0][1] in victim.links_lost()[0].reason
        # Frames that a link may carry, but no slot holds: dropped and counted, or refused for their sequence alone.
        honest = await link()
        for frame in (
            activation(deployed, TokenRun(5, 0, 0, 2)),
            to_frame(Released(9, 3), deployed.id, 1, 1),
            opened(6, 1),
            opened(6, 1),
            opened(7, 1),
            opened(8, 2),
            activation(deployed, TokenRun(8, 2, 4, 2)),
            activation(deployed, TokenRun(6, 2, 0, 2)),
        ):
            honest.send(frame)
        held = await victim.load()
        async with asyncio.timeout(WAIT_S):  # the first frame and the last one are dropped
            while held.dropped_frames < 2:
                held = await victim.load()
        loaded = {(identity, index) for identity, index, _ in held.stages}
        assert held.dropped_frames == 2
        assert loaded == {(healthy.id, 0), (deployed.id, 1)}
        assert len(victim.links_lost()) == 1, "told once until the links are made anew"
        assert not honest.lost, honest.lost
        so_far = len(victim.tokens(aside)[0])
        await healthy.some(aside, so_far + 5)
        assert victim.host.state == "running"
        honest.close()


async def test_a_port_scan_reaches_nothing(tmp_path: Path) -> None:
    async with devices(1, tmp_path, in_process=True) as made:
        with socket.create_connection(("127.0.0.1", made[0].port), timeout=5) as plain:
            plain.sendall(b"GET /data/" + b"0" * 32 + b"/1/1 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.to_thread(plain.recv, 1000) == b""
        await made[0].host.ask(Unload(made[0].host.next_request(), "00" * 16), WAIT_S)
