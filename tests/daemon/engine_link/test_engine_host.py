"""The engine host: answers, deaths, restarts, and an engine in the daemon's own process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from peerllm.daemon.engine_link import engine_child, engine_host, restart_backoff
from peerllm.daemon.engine_link.engine_child import diagnose, oom_kills
from peerllm.engine.messages import WORKING_STEPS, Inspect, Measure, QueryLoad, Submit
from peerllm.errors import BadInputError, EngineError, ModelError
from tests.engine.engines import GREEDY, WAIT_S, Device, deploy, devices
from tests.engine.tiny import make_llama, prompt, reference

pytestmark = pytest.mark.timeout(180)


async def test_answers_errors_and_timeouts(tmp_path: Path) -> None:
    async with devices(1, tmp_path) as (device,):
        host = device.host
        assert host.state == "running" and host.pid is not None and psutil.pid_exists(host.pid)
        (configured,) = device.ready
        assert configured.runtime_bytes > 50 << 20 and "llama" in configured.architectures
        assert "float32" in configured.dtypes and configured.versions["torch"] == __import__("torch").__version__
        measured = await host.ask(Measure(host.next_request()), WAIT_S)
        assert measured.gbytes_per_s["float32"] > 0 and measured.gflops["float32"] > 0
        with pytest.raises(ModelError, match="directory"):
            await host.ask(Inspect(host.next_request(), str(tmp_path / "none"), "auto"), WAIT_S)
        with pytest.raises(EngineError, match="did not answer"):
            await host.ask(Measure(host.next_request()), 0.01)
        with pytest.raises(EngineError, match="already"):
            await host.ask(device.configure(host.next_request()), WAIT_S)
        with pytest.raises(EngineError, match="already"):
            await host.start()
        pid = host.pid
        await host.close()
        await host.close()
        assert host.state == "stopped" and not psutil.pid_exists(pid)
        with pytest.raises(EngineError, match="not running"):
            await host.ask(QueryLoad(host.next_request()), WAIT_S)
        host.tell(Submit("ab" * 16, 1, (1,), 1, (), GREEDY))
        await device.until(lambda: device.tokens(1)[1] is not None)
        assert "not running" in device.tokens(1)[1].error


async def test_a_dead_engine_fails_what_was_asked_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, if it was working; else after a pause."""
    monkeypatch.setattr(restart_backoff, "RESTART_FIRST_S", 9999.0)
    async with devices(1, tmp_path) as (device,):
        host, model = device.host, make_llama(tmp_path / "model")
        deployed = await deploy([device], model, ((0, 0, 5),))
        await deployed.generate(prompt(9), WORKING_STEPS + 8)
        monkeypatch.setattr(restart_backoff, "RESTART_FIRST_S", 0.05)
        os.kill(host.pid, signal.SIGKILL)
        await device.until(lambda: len(device.ready) == 2)
        for number in range(1, 3):
            assert host.pid is not None
            os.kill(host.pid, signal.SIGSTOP)
            asking = asyncio.create_task(host.ask(QueryLoad(host.next_request()), WAIT_S))
            await asyncio.sleep(0)
            os.kill(host.pid, signal.SIGKILL if number == 1 else signal.SIGSEGV)
            os.kill(host.pid, signal.SIGCONT)
            with pytest.raises(EngineError, match="SIGKILL" if number == 1 else "SIGSEGV"):
                await asking
            await device.until(lambda count=number + 1: len(device.lost) == count)
            assert host.state.startswith("crashed: ")
            await device.until(lambda count=number + 2: len(device.ready) == count)
            assert host.state == "running" and len({ready.port for ready in device.ready}) == 1
        deployed = await deploy([device], model, ((0, 0, 5),))
        assert await deployed.generate(prompt(9), 8) == reference(model, prompt(9), 8)


async def test_a_port_in_use_is_told_by_start(tmp_path: Path) -> None:
    async with devices(1, tmp_path) as (first,):
        second = Device(tmp_path / "second")
        second.port = first.port
        with pytest.raises(BadInputError, match="in use"):
            await second.start()
        assert second.host.state == "stopped" and second.host.pid is None and not second.lost


async def test_an_engine_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(EngineError, match="cannot be started"):
        await device.start()


async def test_closing_kills_an_engine_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_child, "CLOSE_TIMEOUT_S", 0.3)
    async with devices(1, tmp_path) as (device,):
        pid = device.host.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        await device.host.close()
        assert time.monotonic() - started < 5 and not psutil.pid_exists(pid)


async def test_in_process(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    before = {thread.name for thread in threading.enumerate()}
    async with devices(2, tmp_path, in_process=True) as made:
        assert made[0].host.pid is None and made[0].host.state == "running"
        deployed = await deploy(made, model, ((0, 0, 1), (1, 2, 3), (0, 4, 5)))
        answers = await asyncio.gather(*(deployed.generate(prompt(20, n), 10) for n in range(4)))
        assert answers == [reference(model, prompt(20, n), 10) for n in range(4)]
        running = deployed.submit(prompt(5), 50)
        await deployed.some(running, 1)
        await made[1].host.close()
        await made[0].until(lambda: bool(made[0].links_lost()))
        deployed.cancel(running)  # until then it waits
        _, end = await deployed.finished(running)
        assert end.finish == "cancelled"
    left = {thread.name for thread in threading.enumerate() if thread.name.startswith("engine-")}
    assert left <= before, left


async def test_an_engine_in_process_that_fails_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peerllm.engine.process.compute import Compute

    monkeypatch.setattr(restart_backoff, "RESTART_FIRST_S", 0.05)
    async with devices(1, tmp_path, in_process=True) as (device,):
        with monkeypatch.context() as broken:
            broken.setattr(Compute, "_load", lambda self, request: 1 // 0)
            with pytest.raises(EngineError, match="ZeroDivisionError"):
                await device.load()
            await device.until(lambda: bool(device.lost))
        await device.until(lambda: len(device.ready) == 2)
        assert (await device.load()).stages == ()


async def test_listeners_that_fail_do_not_end_the_supervision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    device = Device(tmp_path)
    host = engine_host.EngineHost(device.configure, fail, fail, fail, in_process=False, threads=1)
    try:
        await host.start()
        host.tell(Submit("ab" * 16, 1, (1,), 1, (), GREEDY))
        await host.ask(QueryLoad(host.next_request()), WAIT_S)
        assert host.state == "running" and caplog.text.count("fail failed") == 2
    finally:
        await host.close()


@pytest.mark.parametrize(
    ("code", "tail", "killed", "words"),
    [
        (-9, [], True, "out of memory"),
        (-9, [], False, "SIGKILL"),
        (1, ["Traceback", "MemoryError"], False, "out of memory"),
        (-6, ["terminate called after throwing an instance of 'std::bad_alloc'"], False, "out of memory"),
        (-11, ["something"], False, "SIGSEGV"),
        (-99, [], False, "signal 99"),
        (70, ["engine: port 5 is in use"], False, "port 5 is in use"),
        (3, ["boom"], False, "status 3: boom"),
        (0, [], False, "status 0"),
    ],
)
def test_diagnosis(code: int, tail: list[str], killed: bool, words: str) -> None:
    text = diagnose(code, tail, killed)
    assert words in text and "\n" not in text


def test_oom_kills_are_counted_in_both_kinds_of_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert oom_kills() >= 0
    root, listing = tmp_path / "cgroup", tmp_path / "list"
    (root / "a" / "b").mkdir(parents=True)
    (root / "memory" / "c").mkdir(parents=True)
    (root / "a" / "b" / "memory.events").write_text("low 0\noom 7\noom_kill 3\n")
    (root / "memory" / "c" / "memory.oom_control").write_text("under_oom 0\noom_kill 4\n")
    listing.write_text("12:cpu:/x\n5:memory:/c\n0::/a/b\n")
    monkeypatch.setattr(engine_child, "CGROUP_FILES", (listing, root))
    assert oom_kills() == 7
    listing.write_text("nonsense")
    assert oom_kills() == 0


async def test_a_daemon_that_cannot_configure_is_told(tmp_path: Path) -> None:
    device = Device(tmp_path)
    (tmp_path / "device.crt").unlink()
    host = engine_host.EngineHost(lambda request: 1 // 0, print, print, print, in_process=False, threads=1)
    for one in (device.host, host):
        with pytest.raises((EngineError, BadInputError), match=r"cannot be read|ZeroDivisionError"):
            await one.start()
        assert one.state == "stopped" and one.pid is None
