"""This device's engine, and what the device can do with it: known from an earlier start, or found out now."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import psutil

from peerllm import PROTOCOL_VERSION, __version__
from peerllm.daemon.background_tasks import BackgroundTasks
from peerllm.daemon.control_messages import Hello
from peerllm.daemon.engine_link import engine_facts, machine
from peerllm.daemon.engine_link.engine_host import IDLE, RUNNING, WAKING, EngineHost
from peerllm.daemon.engine_link.profiler import ComputeSpeed, Profiler, measured
from peerllm.daemon.settings import Settings
from peerllm.engine.messages import (
    Configure,
    Configured,
    FromEngine,
    LinkTimed,
    TimeLink,
    Trust,
    Trusted,
)
from peerllm.errors import UnavailableError
from peerllm.transport.identity import Identity
from peerllm.transport.roster.entry import RosterEntry
from peerllm.types import DeviceId

ECHO_TIMEOUT_S = 10.0  # dialling another device's engine and timing a few frames


class EngineWatcher(Protocol):
    """Who acts on what happens to the engine."""

    def needed(self) -> bool:
        """Whether layers are held here, or may soon be."""
        ...

    def heard(self, event: FromEngine) -> None:
        """It told something that answers no question."""
        ...

    def lost(self, reason: str) -> None:
        """It died while it was running."""
        ...

    def ready(self) -> None:
        """It has started."""
        ...

    def changed(self) -> None:
        """Its state changed otherwise."""
        ...


class DeviceEngine:
    """`start` it, `close` it. While it has no `watcher`, it is kept, and nobody hears what happens to it."""

    def __init__(
        self, settings: Settings, identity: Identity, threads: int, roster: Callable[[], tuple[RosterEntry, ...]]
    ) -> None:
        self._settings, self._identity, self._roster = settings, identity, roster
        self._threads = threads
        self.watcher: EngineWatcher | None = None
        self.host = EngineHost(
            self._configure,
            self._heard,
            self._lost,
            self._ready,
            settings.in_process,
            threads,
            needed=lambda: self.watcher is None or self.watcher.needed(),
            on_state=self._changed,
        )
        self._configured: Configured | None = None
        self._compute = ComputeSpeed("", {}, {})
        self._memory_bytes = 0  # of the machine, or of the accelerator
        self._machine = machine.fingerprint()
        self._profiler: Profiler | None = None
        self._tasks = BackgroundTasks()

    async def start(self) -> None:
        """Returns when it is known what the engine can do; it runs only if that was not known before.

        With ports free to choose, only a running engine knows its own.
        """
        settings, known = self._settings, None
        if settings.port and settings.compute == "cpu" and not settings.in_process:
            known = await asyncio.to_thread(engine_facts.recall, settings.data_dir / "engine.json", self._threads)
        if known is not None:
            self.host.start_idle()
            self._configured = replace(known, port=settings.data_port)
        else:
            self._configured = await self.host.start()
        self._memory_bytes = self._configured.memory_bytes or machine.memory_bytes()

    async def measure(self) -> None:
        """Find out how fast it computes, unless that is known."""
        file = self._settings.data_dir / "measured.json"
        self._compute = await measured(self.host, self.configured, self._threads, file)

    async def renew(self, threads: int) -> None:
        """It is started anew with so many threads, and measured."""
        self._threads = threads
        self.host.renew(threads)
        await self.measure()
        if self._profiler is not None:
            self._profiler.computed_by(self._compute.key)

    async def close(self) -> None:
        """May be called twice."""
        await self.host.close()
        await self._tasks.close()

    @property
    def configured(self) -> Configured:
        """What it said of itself; UnavailableError before it did."""
        if self._configured is None:
            raise UnavailableError("the engine has not started yet")
        return self._configured

    @property
    def runtime_bytes(self) -> int:
        """What its libraries take; 0 while it does not run."""
        return self.configured.runtime_bytes if self.host.state == RUNNING else 0

    @property
    def resident_bytes(self) -> int:
        """The size of its process, as measured; 0 while there is none."""
        if self.host.pid is None and not self._settings.in_process:
            return 0
        try:
            return int(psutil.Process(self.host.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def profiler(self, free_bytes: Callable[[], int]) -> Profiler:
        """Times layers with it, in the memory that is free."""
        file = self._settings.data_dir / "profiles.json"
        self._profiler = Profiler(self.host, free_bytes, self._compute.key, file)
        return self._profiler

    def lent_bytes(self, wish: int | None) -> int:
        """What can be lent now of the memory that it computes in, of the `wish` of its owner."""
        configured = self.configured
        if configured.memory_bytes:
            return machine.lent_of(wish, configured.memory_bytes, configured.free_bytes)
        return machine.lent_bytes(wish, configured.runtime_bytes, self.host.state not in (IDLE, WAKING))

    def hello(self, offered_bytes: int) -> Hello:
        """What this device says of itself, of which it lends so much."""
        configured = self.configured
        return Hello(
            protocol=PROTOCOL_VERSION,
            version=__version__,
            libraries=configured.versions,
            name=self._settings.name,
            control_port=self._settings.port,
            data_port=configured.port,
            memory_bytes=self._memory_bytes,
            lent_bytes=offered_bytes,
            gbytes_per_s=self._compute.gbytes_per_s,
            gflops=self._compute.gflops,
            architectures=configured.architectures,
            dtypes=configured.dtypes,
            machine=self._machine,
            place=configured.place,
            threads=self._threads,
            processors=os.cpu_count() or 1,
        )

    def trust(self, entries: tuple[RosterEntry, ...]) -> None:
        """The household has these members now."""
        self.host.tell(Trust(self._trusted(entries)))

    async def time_link(
        self, device: DeviceId, hosts: tuple[str, ...], port: int, sizes: Sequence[int]
    ) -> Sequence[tuple[int, float]]:
        """Frames of these sizes to another device's engine: bytes and seconds of each."""
        asked = TimeLink(self.host.next_request(), device, hosts, port, tuple(sizes))
        timed: LinkTimed = await self.host.ask(asked, ECHO_TIMEOUT_S)
        return timed.frames

    # ---- inside -------------------------------------------------------------------------------------------------

    def _configure(self, request: int) -> Configure:
        return Configure(
            request=request,
            device=self._identity.device,
            certificate_path=str(self._identity.certificate_path),
            key_path=str(self._identity.key_path),
            hosts=self._settings.hosts,
            port=self._configured.port if self._configured is not None else self._settings.data_port,
            threads=self._threads,
            trusted=self._trusted(self._roster()),
            compute=self._settings.compute,
        )

    def _trusted(self, entries: tuple[RosterEntry, ...]) -> tuple[Trusted, ...]:
        me = self._identity.device
        return tuple(Trusted(entry.device, entry.certificate_pem) for entry in entries if entry.device != me)

    def _heard(self, event: FromEngine) -> None:
        if self.watcher is not None:
            self.watcher.heard(event)

    def _lost(self, reason: str) -> None:
        if self.watcher is not None:
            self.watcher.lost(reason)

    def _changed(self, state: str) -> None:
        if self.watcher is not None:
            self.watcher.changed()

    def _ready(self, configured: Configured) -> None:
        self._configured = configured
        file = self._settings.data_dir / "engine.json"
        self._tasks.start(asyncio.to_thread(engine_facts.save, file, self._threads, configured), "save engine facts")
        if self.watcher is not None:
            self.watcher.ready()
