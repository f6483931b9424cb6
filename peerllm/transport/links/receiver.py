"""The receiving end of a link: one connection, read until it ends by whichever thread has time for it."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns

from peerllm.errors import FrameError, PeerLLMError
from peerllm.transport.dial import CLOSE_TIMEOUT_S
from peerllm.transport.frames import Frame, FrameLimits, decode
from peerllm.transport.links.connection import Connection
from peerllm.transport.links.lead import Readers
from peerllm.transport.links.outbox import Outbox
from peerllm.transport.links.pulse import Pulse
from peerllm.transport.links.timing import answer
from peerllm.transport.links.watch import NOBODY_WATCHES, Watch
from peerllm.transport.links.websocket import (
    BINARY,
    CLOSE,
    INTERNAL_ERROR,
    OK,
    PING,
    POLICY_VIOLATION,
    PONG,
    Reader,
    control,
    goodbye,
    read_goodbye,
)
from peerllm.types import DeviceId

READS = 32  # records of one connection in a row, before others have their turn

# Runs on the loop, or on the thread that waits for frames, and must be cheap. What it raises (a PeerLLMError) ends the
# link; what it returns, if anything, is awaited on the loop before the next frame is read, so that a stage with too
# much to do holds back its sender.
Deliver = Callable[[DeviceId, Frame], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class Ingress:
    """Who may send to a stage, and what."""

    sender: DeviceId
    limits: FrameLimits


class Receiver:
    """Reads one link; `reason` is why it broke, empty after an orderly end. All but `read` is for the loop."""

    def __init__(
        self,
        connection: Connection,
        ingress: Ingress,
        deliver: Deliver,
        ended: Callable[[Receiver], None],
        readers: Readers,
        watch: Watch = NOBODY_WATCHES,
    ) -> None:
        self.ingress = ingress
        self.delivered = 0  # frames
        self.reason = ""
        self._connection, self._readers = connection, readers
        self._deliver, self._ended, self._watch = deliver, ended, watch
        self._loop = asyncio.get_running_loop()
        self._turn = threading.Lock()  # frames are taken in one after the other, in their order
        self._reader = Reader(ingress.limits.max_bytes, masked=True)
        self._taken = perf_counter()  # when the last frame was
        self._outbox = Outbox(connection, self._loop)
        self._pulse = Pulse(connection, self._beat)
        self._orderly = self._over = self._held = False
        self._goodbye = b""  # what is said at the end
        self._ending, self._gone = asyncio.Event(), asyncio.Event()
        self._hold: asyncio.Task[None] | None = None
        name = f"link from {ingress.sender[:8]}"
        readers.add(connection.fd, self.read)
        self._task = self._loop.create_task(self._run(name), name=name)

    def read(self) -> None:
        """Take in what has come."""
        with self._turn:
            if self._over or self._held:
                return
            try:
                for _ in range(READS):
                    if not self._read() or not self._take_in():
                        return
            except Exception as error:
                self._fail(error)

    def abort(self, reason: str) -> None:
        """Cut the connection now."""
        with self._turn:
            self._end(reason)
        self._close()

    def replace(self) -> None:
        """Make way for a new connection of the same sender; lost only if frames may be missing."""
        self._orderly = not self.delivered
        self.abort("replaced by a new connection")

    async def close(self) -> None:
        """Tell the sender that nothing more is expected here; not reported as lost."""
        self._orderly = True
        with self._turn:
            self._end("", goodbye(OK, "no longer expected"))
        await self.wait_closed()

    def when_closed(self, call: Callable[[Receiver], None]) -> None:
        """It will be called when the connection has been given back."""
        self._task.add_done_callback(lambda _: call(self))

    async def wait_closed(self) -> None:
        """Until the connection has been given back."""
        await asyncio.wait({self._task})

    async def _run(self, name: str) -> None:
        beat = self._loop.create_task(self._pulse.run(self.abort), name=f"{name} beat")
        try:
            await self._ending.wait()
            self._ended(self)  # before the goodbye, whose answer may take its time
            if self._goodbye and not self._connection.closed:
                await self._say_goodbye()
        finally:
            for task in (beat, self._hold):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            self._close()

    async def _say_goodbye(self) -> None:
        """What still comes is dropped: closed with bytes unread, the system would drop the goodbye instead."""
        self._readers.remove(self._connection.fd)
        self._loop.add_reader(self._connection.fd, self._drop)
        self._outbox.say(control(CLOSE, self._goodbye, masked=False))
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._gone.wait()
        except TimeoutError:
            return

    def _drop(self) -> None:
        try:
            if self._connection.read() == b"":
                self._gone.set()
        except OSError:
            self._gone.set()
        if self._gone.is_set():
            self._loop.remove_reader(self._connection.fd)

    def _close(self) -> None:
        if not self._connection.closed:
            self._outbox.detach()
            self._readers.remove(self._connection.fd)
            self._loop.remove_reader(self._connection.fd)
            self._connection.close()
        self._gone.set()

    def _beat(self) -> None:
        if not self._over and not self._outbox.busy:
            self._outbox.say(control(PONG, b"", masked=False))

    def _hold_back(self, rest: Awaitable[None], since_ns: int) -> None:
        if not self._over:
            self._hold = self._loop.create_task(self._read_after(rest, since_ns), name=f"{self._task.get_name()} held")
        elif asyncio.iscoroutine(rest):
            rest.close()

    async def _read_after(self, rest: Awaitable[None], since_ns: int) -> None:
        self._pulse.reading = False
        await rest
        self._pulse.reading = True
        self._pulse.arrived()
        if since_ns:
            limits = self.ingress.limits
            self._watch.held(limits.deployment, self.ingress.sender, limits.stage, since_ns, perf_counter_ns())
        with self._turn:
            self._held = False
            if self._over:
                return
            try:
                self._take_in()  # what had come with the frame
            except Exception as error:
                self._fail(error)
            if not self._over and not self._held:
                self._readers.add(self._connection.fd, self.read)

    # ---- in turn, on whichever thread -------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Whether anything came."""
        reader = self._reader
        if (room := reader.room) is not None:
            nbytes = self._connection.read_into(room)
            if nbytes:
                reader.filled(nbytes)
        else:
            data = self._connection.read()
            nbytes = None if data is None else len(data)
            if data:
                reader.feed(data)
        if nbytes == 0:
            self._end("the connection broke")
        elif nbytes:
            self._pulse.arrived()
        return bool(nbytes)

    def _take_in(self) -> bool:
        """All messages that are complete; whether to read on at once: a larger one has begun."""
        while (message := self._reader.next()) is not None:
            opcode, payload = message
            if opcode == BINARY:
                if not self._deliver_frame(payload):
                    return False
            elif opcode == PING:
                pong = control(PONG, answer(bytes(payload), self._taken, perf_counter()), masked=False)
                self._outbox.say(pong)
            elif opcode == CLOSE:
                code, reason = read_goodbye(payload)
                self._orderly = self._orderly or code == OK
                self._end(reason or "the connection broke", goodbye(OK, ""))
                return False
        return self._reader.missing

    def _deliver_frame(self, payload: bytes | bytearray) -> bool:
        """Whether there is room for more after it."""
        sender = self.ingress.sender
        self.delivered += 1
        came = perf_counter_ns() if self._watch.on else 0
        frame = decode(payload, self.ingress.limits)
        rest = self._deliver(sender, frame)
        self._taken = perf_counter()
        handed_on = perf_counter_ns() if came else 0
        if came:
            self._watch.received(sender, frame, self.delivered, len(payload), came, handed_on)
        if rest is not None:
            self._held = True
            self._readers.remove(self._connection.fd)
            self._loop.call_soon_threadsafe(self._hold_back, rest, handed_on)
            return False
        return True

    def _fail(self, error: Exception) -> None:
        match error:
            case PeerLLMError():  # a frame the plan does not allow, or no room for it
                code = POLICY_VIOLATION if isinstance(error, FrameError) else INTERNAL_ERROR
                self._end(str(error), goodbye(code, str(error)))
            case OSError():
                self._end(f"the connection broke: {error}")
            case _:  # a fault of ours must not end a link in silence
                traceback.print_exception(error)
                reason = f"{type(error).__name__}: {error}"
                self._end(reason, goodbye(INTERNAL_ERROR, reason))

    def _end(self, reason: str, farewell: bytes = b"") -> None:
        if self._over:
            return
        self._over = True
        self.reason = "" if self._orderly else reason
        self._goodbye = farewell
        self._readers.remove(self._connection.fd)  # it would go on saying that there is something
        self._loop.call_soon_threadsafe(self._ending.set)
