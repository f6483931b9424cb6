"""The daemon's side of its engine: starts it when it is needed, asks, tells and hears it, restarts it when it dies.

An engine's libraries alone take 100 to 400 MB, so the process is ended when it holds nothing and was asked nothing for
IDLE_S; the next question starts a new one and waits for it. Never imports torch.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from peerllm.daemon.engine_link.engine_child import FIXED, EngineChild
from peerllm.daemon.engine_link.restart_backoff import RestartBackoff
from peerllm.engine.messages import (
    Configure,
    Configured,
    Failed,
    FromEngine,
    LinkLost,
    LinkTraffic,
    LoadProgress,
    Submit,
    ToEngine,
    Tokens,
    Trust,
    Working,
)
from peerllm.engine.process.engine_line import Channel, SocketChannel
from peerllm.errors import EngineDownError, EngineError, LinkError, PeerLLMError, error_class

log = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0  # libraries on a small board, from a slow card
IDLE_S = 60.0  # an engine that holds nothing and was asked nothing for so long is ended
MAX_PENDING = 1024  # questions the engine has not answered
STOP_TIMEOUT_S = 10.0  # for the threads of an engine in this process
STARTING, RUNNING, STOPPED = "starting", "running", "stopped"
IDLE, WAKING = "idle", "waking"  # no process, for want of work; and a process that a question has just started
AVAILABLE = frozenset({RUNNING, IDLE, WAKING})  # states in which the device can take part in a plan


class _Engine(Protocol):
    """A started engine, whichever way it runs."""

    @property
    def pid(self) -> int | None: ...
    async def ended(self) -> str: ...
    async def close(self) -> None: ...


class EngineHost:
    """Owns one engine. Callbacks run on the loop: `on_event` for what answers no question, `on_lost` with the reason
    when a running engine died, `on_ready` after every start, `on_state` when an engine is ended or wanted again.

    `needed`: whether the engine must be kept though nothing is asked of it. One in this process is always kept: its
    libraries would not leave the memory with it.
    """

    def __init__(
        self,
        configure: Callable[[int], Configure],
        on_event: Callable[[FromEngine], None],
        on_lost: Callable[[str], None],
        on_ready: Callable[[Configured], None],
        in_process: bool,
        threads: int,
        *,
        needed: Callable[[], bool] = lambda: True,
        on_state: Callable[[str], None] = lambda state: None,
    ) -> None:
        self._configure, self._on_event, self._on_lost, self._on_ready = configure, on_event, on_lost, on_ready
        self._in_process, self._threads = in_process, threads
        self._needed, self._on_state = needed, on_state
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._channel: Channel | None = None  # set once Configure has been sent
        self._engine: _Engine | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Configured] | None = None  # the start that is awaited
        self._wanted = asyncio.Event()  # an idle engine is asked for
        self._used = 0.0  # when something was last asked of the engine
        self._backoff = RestartBackoff(time.monotonic)
        self._state = STOPPED

    @property
    def state(self) -> str:
        """ "starting", "running", "idle", "waking", "crashed: why" or "stopped"."""
        return self._state

    @property
    def pid(self) -> int | None:
        """The engine's process; None if there is none of its own."""
        return None if self._engine is None else self._engine.pid

    def next_request(self) -> int:
        """A number for the next question."""
        return next(self._numbers)

    async def start(self) -> Configured:
        """Starts the engine; raises what was wrong if this first start fails."""
        ready = self._begin(idle=False)
        try:
            return await asyncio.shield(ready)
        except PeerLLMError:
            await self.close()
            raise

    def start_idle(self) -> None:
        """Takes up the engine's supervision without a process: the first question starts it."""
        self._begin(idle=True)

    def wake(self) -> None:
        """Starts an idle engine ahead of the first question. Nothing happens in any other state."""
        if self._state == IDLE:
            self._state, self._ready = WAKING, asyncio.get_running_loop().create_future()
            self._wanted.set()
            self._call(self._on_state, WAKING)

    def renew(self, threads: int) -> None:
        """The next engine has so many threads; one that runs is ended, and the next question starts another."""
        self._threads = threads
        if self._channel is not None and self._state == RUNNING:
            self._state = IDLE
            self._channel.close()
            self._call(self._on_state, IDLE)

    async def ask(self, message: Any, timeout_s: float) -> Any:
        """The answer to a message that carries a request number; raises the error that the engine names.

        An idle engine is started first; `timeout_s` counts from when it is ready.
        """
        self.wake()
        if self._state == WAKING and self._ready is not None:
            await asyncio.shield(self._ready)
        channel = self._channel
        if channel is None:
            raise EngineDownError(f"the engine is not running ({self._state})")
        return await self._ask(channel, message, timeout_s)

    def put(self, message: Any, timeout_s: float) -> Coroutine[Any, Any, Any]:
        """As `ask`, but sent before this returns, ahead of all that is told later. EngineError if no engine runs."""
        if self._channel is None:
            raise EngineDownError(f"the engine is not running ({self._state})")
        answer = self._expect(message.request)
        try:
            self._channel.send(message)
        except LinkError as error:
            self._pending.pop(message.request, None)
            raise EngineDownError(f"the engine is not running: {error}") from error
        return self._answered(answer, message, timeout_s)

    def tell(self, message: ToEngine) -> None:
        """Sends a message that has no answer; never raises.

        Without an engine a Submit ends with an error, and the rest is dropped: the next engine is configured anew.
        """
        channel = self._channel
        try:
            if channel is None:
                raise EngineDownError(f"the engine is not running ({self._state})")
            channel.send(message)
        except PeerLLMError as error:
            if isinstance(message, Submit):
                lost = Tokens(message.deployment, message.sequence, 0, (), "error", str(error))
                asyncio.get_running_loop().call_soon(self._hear, lost)
            elif isinstance(message, Trust) and channel is not None:
                # This engine would go on to serve devices that were removed; the next one is configured without them.
                log.error("the engine cannot be told who is of the household (%s); starting it again", error)
                channel.close()

    async def close(self) -> None:
        """Ends the engine: closes the line, then kills what does not go. May be called twice."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        self._state = STOPPED
        self._started_or(EngineError("the engine was stopped"))

    def _begin(self, idle: bool) -> asyncio.Future[Configured]:
        if self._supervisor is not None:
            raise EngineError("the engine was started already")
        ready = self._ready = asyncio.get_running_loop().create_future()
        self._state = IDLE if idle else STARTING
        self._supervisor = asyncio.create_task(self._supervise(idle), name="engine host")
        return ready

    def _started_or(self, why: PeerLLMError) -> None:
        """Tells whoever waits for the engine's start why it failed."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(why)
            self._ready.exception()  # whoever waits may be gone

    async def _supervise(self, idle: bool) -> None:
        first = not idle
        while True:
            if idle:
                await self._wanted.wait()
                self._wanted.clear()
            else:
                self._state = STARTING
            self._backoff.started()
            why: PeerLLMError = EngineError("the engine ended")
            try:
                await self._live()
                first, idle = False, True
                continue
            except PeerLLMError as error:
                why = error
            except Exception as error:  # supervision outlives whatever goes wrong in it
                log.exception("the engine host failed")
                why = EngineError(f"the engine cannot be run: {type(error).__name__}: {error}")
            was_ready, self._state, idle = self._state == RUNNING, f"crashed: {why}", False
            self._started_or(why)
            if first and not was_ready:
                return
            first = False
            pause_s = self._backoff.pause_s()
            log.error("%s; starting the engine again%s", why, f" in {pause_s:.1f} s" if pause_s else "")
            self._call(self._on_lost if was_ready else self._on_state, str(why))
            await asyncio.sleep(pause_s)

    async def _live(self) -> None:
        """One engine from its start to its end: returns if it became idle, else raises why it ended."""
        channel, engine = await self._launch()
        self._engine = engine
        hearing = asyncio.create_task(self._listen(channel), name="engine host listens")
        why: PeerLLMError = EngineError("the engine was stopped")
        try:
            configured = await self._introduce(channel, engine, hearing)
            self._state, self._used = RUNNING, time.monotonic()
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(configured)
            self._call(self._on_ready, configured)
            while not hearing.done() and not self._now_idle():
                await asyncio.wait({hearing}, timeout=self._used + IDLE_S - time.monotonic())
            if self._state == IDLE:
                return
            hearing.result()
            why = EngineError(await engine.ended())
            raise why
        except LinkError as error:
            why = EngineError(f"the engine broke the line: {error}")
            raise why from error
        finally:
            self._channel = self._engine = None
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)
            self._fail_pending(str(why))
            channel.close()
            await engine.close()

    def _now_idle(self) -> bool:
        """Whether the engine is to be ended; from this moment on a question starts the next one."""
        if self._pending or self._in_process or self._needed():
            self._used = time.monotonic()
            return False
        if time.monotonic() - self._used < IDLE_S:
            return False
        log.info("the engine holds nothing and is not needed: it ends until it is")
        self._state = IDLE
        self._call(self._on_state, IDLE)
        return True

    async def _launch(self) -> tuple[Channel, _Engine]:
        if self._in_process:
            thread = _EngineThread()
            return thread.channel, thread
        try:
            child = await EngineChild.start(self._threads)
        except OSError as error:
            raise EngineError(f"the engine cannot be started: {error}") from error
        try:
            return await SocketChannel.on(child.socket, ToEngine, FromEngine), child
        except BaseException:  # closed meanwhile: nobody else knows of this process yet
            child.socket.close()
            await child.close()
            raise

    async def _introduce(self, channel: Channel, engine: _Engine, hearing: asyncio.Task[None]) -> Configured:
        """Configures a new engine; raises why it cannot be."""
        request = self.next_request()
        answer = self._expect(request)
        channel.send(self._configure(request))
        self._channel = channel
        await asyncio.wait({answer, hearing}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            configured: Configured = answer.result()
            return configured
        if hearing.done():
            hearing.result()
            raise EngineError(await engine.ended())
        raise EngineError(f"the engine did not start within {START_TIMEOUT_S:g} s")

    async def _listen(self, channel: Channel) -> None:
        """Handles what the engine says, until its line ends."""
        while (message := await channel.receive()) is not None:
            self._hear(message)

    def _hear(self, message: FromEngine) -> None:
        if isinstance(message, Tokens | LoadProgress | LinkLost | LinkTraffic):
            self._call(self._on_event, message)
            return
        if isinstance(message, Working):
            self._backoff.working()
            return
        answer = self._pending.pop(message.request, None)
        if answer is None or answer.done():  # whoever asked waits no longer
            return
        if isinstance(message, Failed):
            answer.set_exception(error_class(message.kind, EngineError)(message.reason))
        else:
            answer.set_result(message)

    async def _ask(self, channel: Channel, message: Any, timeout_s: float) -> Any:
        answer = self._expect(message.request)
        try:
            channel.send(message)
        except LinkError as error:
            self._pending.pop(message.request, None)
            raise EngineDownError(f"the engine is not running: {error}") from error
        return await self._answered(answer, message, timeout_s)

    async def _answered(self, answer: asyncio.Future[Any], message: Any, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise EngineError(f"the engine did not answer {type(message).__name__} within {timeout_s:g} s") from None
        finally:
            self._used = time.monotonic()
            self._pending.pop(message.request, None)

    def _expect(self, request: int) -> asyncio.Future[Any]:
        if len(self._pending) >= MAX_PENDING:
            raise EngineError(f"{MAX_PENDING} questions to the engine are unanswered; ask again later")
        if request in self._pending:
            raise EngineError(f"request number {request} is in use; take one from next_request()")
        answer = self._pending[request] = asyncio.get_running_loop().create_future()
        return answer

    def _fail_pending(self, why: str) -> None:
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            if not answer.done():
                answer.set_exception(EngineError(why))
                answer.exception()  # whoever asked may be gone

    def _call(self, callback: Callable[[Any], None], argument: object) -> None:
        try:
            callback(argument)
        except Exception:  # a fault of the listener must not end the engine's supervision
            log.exception("%s failed", getattr(callback, "__qualname__", callback))


class _EngineThread:
    """An engine in threads of this process: phones and the like kill child processes."""

    pid = None

    def __init__(self) -> None:
        from peerllm.engine.process.launch import start_in_process

        os.environ.update(FIXED)  # read when its libraries are imported
        self._why = ""
        self.channel, self._thread = start_in_process(self._note)

    def _note(self, why: str) -> None:
        self._why = why

    async def ended(self) -> str:
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)
        return self._why or "the engine ended"

    async def close(self) -> None:
        self.channel.close()
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)
