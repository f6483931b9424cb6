"""An engine that nobody needs is ended, and started again by the next question: no memory is used for nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import psutil
import pytest
import pytest_asyncio

from peerllm.codec import MAX_MESSAGE_BYTES
from peerllm.daemon.engine_link import engine_facts, engine_host, machine, restart_backoff
from peerllm.daemon.engine_link.engine_host import EngineHost
from peerllm.engine.messages import Configure, Configured, Measure, QueryLoad, Trust, Trusted
from peerllm.errors import EngineError
from tests.engine.engines import WAIT_S, Device

pytestmark = pytest.mark.timeout(180)


class Owner:
    """A host and what it told; `needed` says whether the engine must stay."""

    def __init__(self, folder: Path, *, in_process: bool = False) -> None:
        self.device = Device(folder)
        self.needed, self.asked_needed = False, 0
        self.states: list[str] = []
        self.on_state: Callable[[str], None] = lambda state: None
        self.configure: Callable[[int], Configure] = self.device.configure
        self._news = asyncio.Event()
        self.host = EngineHost(
            self._configure, self._told, self._lost, self._ready, in_process, 1,
            needed=self._needed, on_state=self._state,
        )  # fmt: skip
        self.lost: list[str] = []
        self.ready: list[Configured] = []

    def _configure(self, request: int) -> Configure:
        return self.configure(request)

    def _told(self, event: object) -> None:
        self._news.set()

    def _lost(self, why: str) -> None:
        self.lost.append(why)
        self._news.set()

    def _ready(self, configured: Configured) -> None:
        self.device.port = configured.port
        self.ready.append(configured)
        self._news.set()

    def _state(self, state: str) -> None:
        self.states.append(state)
        self.on_state(state)
        self._news.set()

    def _needed(self) -> bool:
        self.asked_needed += 1
        self._news.set()
        return self.needed

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def load(self) -> object:
        return await self.host.ask(QueryLoad(self.host.next_request()), WAIT_S)


@pytest_asyncio.fixture
async def owner(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_host, "IDLE_S", 0.2)
    made = Owner(tmp_path)
    yield made
    await made.host.close()


async def test_an_engine_that_holds_nothing_is_ended_and_the_next_question_starts_another(owner: Owner) -> None:
    waits: list[str] = []

    class Wanted(asyncio.Event):
        async def wait(self) -> Literal[True]:
            waits.append(owner.host.state)
            owner._news.set()
            return await super().wait()

    owner.host._wanted = Wanted()
    configured = await owner.host.start()
    pid = owner.host.pid
    assert pid is not None
    await owner.until(lambda: bool(waits))
    assert waits == ["idle"] and owner.host.state == "idle" and owner.host.pid is None
    await asyncio.to_thread(psutil.wait_procs, [psutil.Process(pid)] if psutil.pid_exists(pid) else [], WAIT_S)
    assert not psutil.pid_exists(pid)
    assert (await owner.load()).stages == ()  # type: ignore[attr-defined]
    assert owner.states[:2] == ["idle", "waking"] and not owner.lost
    assert [one.port for one in owner.ready] == [configured.port] * 2, "others find it where the first one was"
    await owner.until(lambda: owner.states == ["idle", "waking", "idle"])


async def test_an_engine_that_is_needed_stays_and_goes_when_it_is_not_any_more(owner: Owner) -> None:
    owner.needed = True
    await owner.host.start()
    pid, before = owner.host.pid, owner.asked_needed
    await owner.until(lambda: owner.asked_needed >= before + 3)
    assert owner.host.pid == pid and owner.host.state == "running" and not owner.states
    owner.needed = False
    since = time.monotonic()
    await owner.until(lambda: owner.host.state == "idle")
    assert time.monotonic() - since >= 0.1, "it counts from when it was needed last"


async def test_a_question_that_takes_longer_than_that_is_answered(owner: Owner) -> None:
    await owner.host.start()
    measured = await owner.host.ask(Measure(owner.host.next_request()), WAIT_S)
    assert measured.gflops and not owner.states


async def test_a_question_counts_as_use(owner: Owner) -> None:
    await owner.host.start()
    before = time.monotonic()
    await owner.load()
    assert owner.host._used > before
    await owner.until(lambda: owner.host.state == "idle")
    assert time.monotonic() - before > 0.2


async def test_a_question_at_the_very_moment_waits_for_the_next_engine(owner: Owner) -> None:
    asked: list[asyncio.Task[object]] = []
    owner.on_state = lambda state: asked.append(asyncio.ensure_future(owner.load())) if state == "idle" else None
    await owner.host.start()
    await owner.until(lambda: bool(asked))
    owner.on_state = lambda state: None
    assert (await asyncio.wait_for(asked[0], WAIT_S)).stages == ()  # type: ignore[attr-defined]
    assert len(owner.ready) == 2


async def test_one_that_begins_idle_starts_when_it_is_asked_and_many_who_ask_share_it(owner: Owner) -> None:
    owner.host.start_idle()
    assert owner.host.state == "idle" and owner.host.pid is None
    await asyncio.gather(*(owner.load() for _ in range(3)))
    assert len(owner.ready) == 1 and owner.states == ["waking"]
    with pytest.raises(EngineError, match="already"):
        owner.host.start_idle()


async def test_waking_ahead_starts_it_once(owner: Owner) -> None:
    owner.needed = True
    owner.host.wake()
    assert owner.host.state == "stopped", "nobody has taken it up"
    owner.host.start_idle()
    for _ in range(2):
        owner.host.wake()
    await owner.until(lambda: bool(owner.ready))
    owner.host.wake()
    assert owner.host.state == "running" and owner.states == ["waking"]


async def test_a_start_on_demand_that_fails_is_told_and_tried_again(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart_backoff, "RESTART_FIRST_S", 0.05)
    owner.needed = True
    owner.configure = lambda request: 1 // 0  # type: ignore[assignment, return-value]
    owner.host.start_idle()
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        await asyncio.wait_for(owner.load(), WAIT_S)
    assert owner.host.state.startswith("crashed") and owner.states[-1].endswith("by zero")
    with pytest.raises(EngineError, match="not running"):
        await owner.load()
    owner.configure = owner.device.configure
    await owner.until(lambda: bool(owner.ready))
    assert owner.host.state == "running" and not owner.lost
    await owner.load()


async def test_who_waits_for_a_start_hears_that_the_host_is_closed(owner: Owner) -> None:
    owner.host.start_idle()
    configuring = asyncio.Event()
    owner.configure = lambda request: (configuring.set(), owner.device.configure(request))[1]
    waiting = asyncio.ensure_future(owner.load())
    await asyncio.wait_for(configuring.wait(), WAIT_S)
    await owner.host.close()
    with pytest.raises(EngineError, match="stopped"):
        await asyncio.wait_for(waiting, WAIT_S)


async def test_an_engine_that_was_woken_and_dies_is_restarted(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart_backoff, "RESTART_FIRST_S", 0.05)
    owner.needed = True
    owner.host.start_idle()
    await owner.load()
    assert owner.host.pid is not None
    os.kill(owner.host.pid, signal.SIGKILL)
    await owner.until(lambda: len(owner.ready) == 2)
    assert len(owner.lost) == 1 and "SIGKILL" in owner.lost[0] and owner.host.state == "running"


async def test_an_engine_in_this_process_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_host, "IDLE_S", 0.05)
    owner = Owner(tmp_path, in_process=True)
    looks: list[bool] = []
    look = owner.host._now_idle
    monkeypatch.setattr(owner.host, "_now_idle", lambda: (looks.append(look()), owner._news.set(), looks[-1])[2])
    try:
        await owner.host.start()
        await owner.until(lambda: len(looks) >= 3)
        assert not any(looks) and owner.host.state == "running"
    finally:
        await owner.host.close()


async def test_an_engine_that_cannot_be_told_of_a_removal_does_not_go_on(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart_backoff, "RESTART_FIRST_S", 0.05)
    owner.needed = True
    await owner.host.start()
    owner.host.tell(Trust((Trusted("a" * 64, "x" * (MAX_MESSAGE_BYTES + 1)),)))
    await owner.until(lambda: len(owner.ready) == 2)
    assert len(owner.lost) == 1, "the next one is configured with who is trusted now"


FACTS = Configured(
    runtime_bytes=1, versions={"python": "", "numpy": ""}, architectures=("llama",), dtypes=("float32",),
    request=7, port=5,
)  # fmt: skip


def test_what_an_engine_can_do_is_recalled_until_something_of_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "engine.json"
    versions = {name: engine_facts._version(name) for name in ("python", "numpy", "nowhere-to-be-found")}
    facts = replace(FACTS, versions=versions)
    assert engine_facts.recall(file, 2) is None
    engine_facts.save(file, 2, facts)
    assert engine_facts.recall(file, 2) == facts and versions["nowhere-to-be-found"] == "unknown"
    assert engine_facts.recall(file, 3) is None, "other threads"
    for change in ({"versions": {**versions, "numpy": "0"}}, {"place": "cuda"}, {"memory_bytes": 1}):
        engine_facts.save(file, 2, replace(facts, **change))
        assert engine_facts.recall(file, 2) is None, change
    engine_facts.save(file, 2, facts)
    with monkeypatch.context() as other:
        other.setattr(engine_facts, "__version__", "0")
        assert engine_facts.recall(file, 2) is None
    with monkeypatch.context() as other:
        other.setattr(engine_facts, "hardware", lambda: "another processor")
        assert engine_facts.recall(file, 2) is None
    file.write_bytes(b"{")
    assert engine_facts.recall(file, 2) is None


def test_facts_that_cannot_be_written_are_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "none").write_text("a file, where the directory should be")
    engine_facts.save(tmp_path / "none" / "engine.json", 2, FACTS)
    assert "not kept" in caplog.text


def test_what_is_lent_leaves_room_for_an_engine_that_does_not_run_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 100 << 30)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=50 << 30))
    assert machine.lent_bytes(None, 1 << 30) == (40 << 30), "what is available leaves the engine out already"
    assert machine.lent_bytes(None, 1 << 30, running=False) == (39 << 30)
    assert machine.lent_bytes(7, 1 << 30, running=False) == 7
