"""Two whole daemons: memory is used where layers are held, and nowhere else."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from peerllm.daemon.daemon import Daemon
from peerllm.daemon.engine_link import engine_host
from peerllm.daemon.facade import GenerateRequest, RunOptions
from peerllm.daemon.settings import Settings
from peerllm.engine.messages import Measure, TimeLayers
from peerllm.types import Sampling

pytestmark = pytest.mark.timeout(240)
LENT = 17_000_000  # bytes: too little for the built-in model on one device
BOUND_S = 60


def free_ports() -> int:
    """The first of three that are free, as a device with fixed ports needs them."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                for offset in (1, 2):
                    with socket.socket() as other:
                        other.bind(("127.0.0.1", port + offset))
            except OSError:
                continue
            return port


def settings(folder: Path, name: str, port: int) -> Settings:
    return Settings(folder / name, name, port=port, memory_bytes=LENT, threads=1, hosts=("127.0.0.1",), mdns=False)


async def until(daemons: list[Daemon], condition: object) -> None:
    """Wait for a change of any daemon that makes `condition` true."""

    async def watch(daemon: Daemon, seen: asyncio.Event) -> None:
        async for _ in daemon.changed():
            seen.set()

    seen = asyncio.Event()
    watchers = [asyncio.create_task(watch(daemon, seen)) for daemon in daemons]
    try:
        async with asyncio.timeout(BOUND_S):
            while not condition():  # type: ignore[operator]
                await seen.wait()
                seen.clear()
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)


def shown(daemon: Daemon, name: str) -> dict[str, object]:
    """A device as this one's `status` has it."""
    return next(one for one in daemon.status()["devices"] if one["name"] == name)


def idle(daemons: list[Daemon]) -> bool:
    return all(shown(daemon, name)["engine"] == "idle" for daemon in daemons for name in ("anna", "bert"))


async def answer(daemon: Daemon) -> list[int]:
    (served,) = (one for one in daemon.models() if one.deployment)
    ids: list[int] = []
    async with asyncio.timeout(BOUND_S):
        async for chunk in daemon.generate(GenerateRequest(served.deployment, (1, 50, 60), 8, Sampling())):
            ids += chunk.ids
    return ids


def watch_questions(daemon: Daemon, asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    ask = daemon.host.ask

    async def asking(message: object, timeout_s: float) -> object:
        asked.append(message)
        return await ask(message, timeout_s)

    monkeypatch.setattr(daemon.host, "ask", asking)


async def test_engines_run_while_layers_are_held_and_plans_are_made_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_host, "IDLE_S", 1.0)
    ports = [free_ports(), free_ports()]
    daemons = [Daemon(settings(tmp_path, name, port)) for name, port in zip(("anna", "bert"), ports, strict=True)]
    anna, bert = daemons
    try:
        await asyncio.gather(*(daemon.start() for daemon in daemons))
        code, port = await anna.invite()
        await bert.join(code, ("127.0.0.1", port))
        await until(daemons, lambda: len(anna.home.candidates()) == len(bert.home.candidates()) == 2)
        await until(daemons, lambda: idle(daemons))
        for daemon in daemons:
            assert daemon.host.pid is None and (await daemon.engine())["resident_bytes"] == 0
            for name in ("anna", "bert"):
                entry = shown(daemon, name)
                assert (entry["lent_bytes"], entry["used_bytes"], entry["resident_bytes"]) == (LENT, 0, 0)
        assert daemon.host.pid is None, "a look at what the engine holds does not start it"
        assert len(anna.home.candidates()) == 2, "an idle device takes part"

        await anna.run(RunOptions("builtin"), lambda progress: None)
        ids = await answer(anna)
        await until(daemons, lambda: all(shown(d, n)["engine"] == "running" for d in daemons for n in ("anna", "bert")))
        for daemon in daemons:
            assert daemon.host.pid is not None
            own = daemon.device_engine.configured.runtime_bytes
            entry = shown(daemon, daemon.settings.name)
            assert entry["used_bytes"] == daemon.ledger.promised_bytes + own > own > 50 << 20
            assert entry["resident_bytes"] == pytest.approx(psutil.Process(daemon.host.pid).memory_info().rss, rel=0.5)
        await until(daemons, lambda: shown(anna, "bert")["used_bytes"] == shown(bert, "bert")["used_bytes"])
        ends = anna.identity.device, bert.identity.device

        def hops() -> int:
            figures = anna.network.link_monitor.figures()
            return sum(pair in figures and figures[pair].hop_ms is not None for pair in (ends, ends[::-1]))

        await until(daemons, lambda: hops() == 2)  # timed from engine to engine, now that both run
        await anna.stop("builtin")
        await until(daemons, lambda: idle(daemons) and not shown(anna, "bert")["used_bytes"])

        await asyncio.gather(*(daemon.close() for daemon in daemons))
        known = [daemon.hello() for daemon in daemons]
        daemons = [Daemon(settings(tmp_path, name, port)) for name, port in zip(("anna", "bert"), ports, strict=True)]
        anna, bert = daemons
        await asyncio.gather(*(daemon.start() for daemon in daemons))
        await until(daemons, lambda: len(anna.home.candidates()) == len(bert.home.candidates()) == 2)
        assert [daemon.host.pid for daemon in daemons] == [None, None], "started without an engine"
        assert [daemon.hello() for daemon in daemons] == known, "and says the same of itself as with one"
        asked: list[object] = []
        for daemon in daemons:
            watch_questions(daemon, asked, monkeypatch)
        await anna.run(RunOptions("builtin"), lambda progress: None)
        assert await answer(anna) == ids
        assert not any(isinstance(message, Measure | TimeLayers) for message in asked), "what was measured is known"
    finally:
        await asyncio.gather(*(daemon.close() for daemon in daemons))


async def test_a_plan_that_others_make_starts_the_engine_ahead_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(replace(settings(tmp_path, "anna", free_ports())))
    woken: list[str] = []
    try:
        await daemon.start()
        watcher = daemon.device_engine.watcher
        assert watcher is not None
        monkeypatch.setattr(daemon.host, "wake", lambda: woken.append("now"))
        views: list[object] = []
        monkeypatch.setattr(daemon.home, "views", lambda: views)

        def told(*states: str) -> int:
            views[:] = [_View(str(number), state) for number, state in enumerate(states)]
            daemon.household_events.changed()
            return len(woken)

        assert told("serving") == 0 and not watcher.needed()
        assert told("serving", "planning") == 1 and watcher.needed()
        assert told("serving", "planning") == 1, "the same plan"
        assert told("serving", "loading") == 1 and watcher.needed()
        assert told("serving", "waiting") == 1 and not watcher.needed()
        assert told("serving", "waiting", "planning") == 2
    finally:
        await daemon.close()


class _View:
    def __init__(self, deployment: str, state: str) -> None:
        self.deployment, self.state, self.stages = deployment, state, ()
