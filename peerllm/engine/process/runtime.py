"""The engine: an I/O loop (line to the daemon, data plane), a compute thread and a loader thread.

A step never waits for the loop: the compute thread feeds tokens back itself, links take frames into their queues, and
what the daemon shall hear is collected and sent when the loop has time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import traceback
from collections import deque
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any

from peerllm.engine.base import Backend
from peerllm.engine.messages import (
    Cancel,
    CarryState,
    Configure,
    Configured,
    Connect,
    Done,
    Failed,
    FromEngine,
    Inspect,
    LoadStage,
    Measure,
    QueryLoad,
    Record,
    Submit,
    Switch,
    TimeLayers,
    TimeLink,
    ToEngine,
    Tokens,
    Trust,
    Trusted,
    Unload,
)
from peerllm.engine.process.compute import Compute, Hurry, Loaded, failed, start
from peerllm.engine.process.data_links import DataLinks
from peerllm.engine.process.engine_line import Channel
from peerllm.engine.process.loading import Loader, Shards
from peerllm.engine.process.recorder import Recorder
from peerllm.errors import EngineError, LinkError, PeerLLMError, one_line

MAX_UNHANDLED = 4096  # messages of the daemon that wait behind one being handled
MAX_UNSENT = 65_536  # messages for the daemon that the loop has not come to; more, and the daemon counts as gone
HURRY_S = 0.1  # between two looks at whether an epoch that is left still brings something back
THREAD_TIMEOUT_S = 5.0  # what closing gives a batch or a load under way; a process of its own does not wait


class Engine:
    """`run` serves one daemon until its line closes, or raises EngineError; `close` then frees everything."""

    def __init__(self, channel: Channel, backend: Backend) -> None:
        self._channel, self._backend = channel, backend
        self._recorder = Recorder()
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[FromEngine] = deque()
        self._unsent_lock = threading.Lock()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads: list[threading.Thread] = []
        self._parts: tuple[Compute, Loader, DataLinks] | None = None
        self._switching: set[int] = set()  # requests of Switch that are not answered yet

    async def run(self) -> None:
        """Messages are read and handled by two tasks, so that the end of the line is noticed while one is handled."""
        messages: asyncio.Queue[ToEngine] = asyncio.Queue(MAX_UNHANDLED)
        reading = asyncio.create_task(self._read(messages), name="engine reads the daemon")
        handling = asyncio.create_task(self._serve(messages), name="engine handles messages")
        try:
            await asyncio.wait({reading, handling, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (handling, self._ended, reading):
                if ended.done():
                    ended.result()
        except LinkError as error:
            raise EngineError(str(error)) from error
        finally:
            for task in (reading, handling):
                task.cancel()
            await asyncio.gather(reading, handling, return_exceptions=True)

    async def close(self) -> None:
        """End threads and links. Idempotent."""
        self._channel.close()
        parts, self._parts = self._parts, None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if parts is not None:
            compute, loader, links = parts
            compute.inbox.close()
            loader.close()
            await links.close()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, THREAD_TIMEOUT_S)

    async def _read(self, messages: asyncio.Queue[ToEngine]) -> None:
        while (message := await self._channel.receive()) is not None:
            await messages.put(message)

    async def _serve(self, messages: asyncio.Queue[ToEngine]) -> None:
        while True:
            message = await messages.get()
            try:
                if isinstance(message, Configure):
                    await self._configure(message)
                elif self._parts is None:
                    raise EngineError("the first message to an engine is Configure")
                else:
                    await self._handle(message, *self._parts)
            except PeerLLMError as error:
                self._refuse(message, error)

    async def _configure(self, message: Configure) -> None:
        if self._parts is not None:
            raise EngineError("the engine is configured already")
        compute = Compute(self._backend, self.tell, self._recorder)
        links = DataLinks(message, compute.inbox, self.tell, self._recorder)
        await links.start(message.trusted)
        # Last, because the resident size that it measures is to include all of the above.
        facts = await asyncio.to_thread(self._backend.facts, message.compute, message.threads)
        # The libraries' hundreds of thousands of objects are never freed: without this, each full collection would walk
        # them and delay the step that it falls into.
        gc.collect()
        gc.freeze()
        batches = lambda: compute.batches  # noqa: E731
        loader = Loader(self._backend, self.tell, self._loaded, batches, self._thread_ended, compute.shards)
        self._parts = compute, loader, links
        self._threads = [start(compute, self._thread_ended), loader.start()]
        self.tell(Configured(**asdict(facts), request=message.request, port=links.port))

    async def _handle(self, message: ToEngine, compute: Compute, loader: Loader, links: DataLinks) -> None:
        match message:
            case Submit() | Cancel() | QueryLoad():
                compute.inbox.put(message)
            case LoadStage() | Inspect() | Measure() | TimeLayers():
                loader.put(message)
            case Record():  # answered here and not behind a pass, because the answer tells the present time
                self.tell(self._recorder.answer(message))
            case Trust(trusted):
                await self._trust(trusted, links)
            case Connect():
                self._spawn(self._connect(message, compute, links), f"connect {message.deployment[:8]}")
            case TimeLink():
                self._spawn(self._time(message, links), f"time the link to {message.device[:8]}")
            case Switch(_, deployment):
                self._switching.add(message.request)
                compute.inbox.put(message, always=True)
                self._spawn(self._hurry(message, compute), f"hurry {deployment[:8]}")
            case CarryState():
                self._spawn(self._carry(message, links), f"carry state of {message.deployment[:8]}")
            case Unload(_, deployment, epoch, only):
                loader.abandon(deployment, epoch, only)
                if epoch is None:
                    self._recorder.forget(deployment)
                compute.inbox.put(message, always=True)
                self._spawn(links.forget(deployment, epoch, only), f"end the links of {deployment[:8]}")

    async def _trust(self, trusted: tuple[Trusted, ...], links: DataLinks) -> None:
        """If the new list cannot be taken, the engine ends, and with it the links of whoever was removed."""
        try:
            await links.trust(trusted)
        except Exception as error:
            self._end(EngineError(f"the household's new certificates cannot be taken: {one_line(error)}"))

    async def _connect(self, message: Connect, compute: Compute, links: DataLinks) -> None:
        try:
            compute.inbox.put(await links.connect(message), always=True)
        except Exception as error:  # what a coordinator asks for must not end the engine
            self._refuse(message, error)

    async def _hurry(self, message: Switch, compute: Compute) -> None:
        """Tell the compute thread that time passes until the switch is answered: it may be waiting for what is lost."""
        while message.request in self._switching:
            await asyncio.sleep(HURRY_S)
            compute.inbox.put(Hurry(message.deployment), always=True)

    async def _carry(self, message: CarryState, links: DataLinks) -> None:
        try:
            await links.carry(message)
        except Exception as error:  # what a coordinator asks for must not end the engine
            self._refuse(message, error)
        else:
            self.tell(Done(message.request))

    async def _time(self, message: TimeLink, links: DataLinks) -> None:
        try:
            self.tell(await links.time(message))
        except PeerLLMError as error:
            self._refuse(message, error)

    def _loaded(self, spec: LoadStage, chain: Shards, fresh: Shards) -> None:
        """Called in the loader thread: the shards go to the compute thread by way of the loop."""
        hand_over = self._hand_over(spec, chain, fresh)
        try:
            self._loop.call_soon_threadsafe(self._spawn, hand_over, f"hand over stage {spec.stage}")
        except RuntimeError:  # the loop has ended
            hand_over.close()

    async def _hand_over(self, spec: LoadStage, chain: Shards, fresh: Shards) -> None:
        """The stage's sender is expected before the daemon hears that the stage is loaded."""
        if self._parts is None:
            return
        compute, loader, links = self._parts
        try:  # nothing in here awaits, so that an Unload comes before all of it or after all of it
            loader.take_over(spec)
            links.expect(spec, chain[0].shard.hidden_size, [one.shard for one in fresh])
            compute.inbox.put(Loaded(spec, chain, fresh), always=True)
        except Exception as error:
            for one in fresh:
                one.shard.close()
            self._refuse(spec, error)

    def _refuse(self, message: ToEngine, error: Exception) -> None:
        match message:
            case Submit(deployment, sequence):
                self.tell(Tokens(deployment, sequence, len(message.answer), (), "error", str(error)))
            case Trust() | Cancel():  # before Configure there are no links and no sequences
                traceback.print_exception(error)
            case _:
                self.tell(failed(message.request, error))

    def tell(self, message: FromEngine) -> None:
        """Tell the daemon. Any thread may call this; it never waits."""
        with self._unsent_lock:
            self._unsent.append(message)
            waiting = len(self._unsent)
        if waiting == 1:
            self._soon(self._flush)
        elif waiting > MAX_UNSENT:
            self._thread_ended(EngineError("the daemon does not read what the engine tells it"))

    def _flush(self) -> None:
        with self._unsent_lock:
            messages = list(self._unsent)
            self._unsent.clear()
        try:
            for message in messages:
                if isinstance(message, Done | Failed):
                    self._switching.discard(message.request)
                self._channel.send(message)
        except LinkError as error:
            self._end(error)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._end(task.exception())

    def _thread_ended(self, error: BaseException | None) -> None:
        self._soon(self._end, error)

    def _soon(self, call: Any, *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the line
            self._loop.call_soon_threadsafe(call, *arguments)

    def _end(self, error: BaseException | None) -> None:
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
            return
        if not isinstance(error, PeerLLMError):
            traceback.print_exception(error)
            error = EngineError(f"the engine failed: {type(error).__name__}: {error}")
        self._ended.set_exception(error)
