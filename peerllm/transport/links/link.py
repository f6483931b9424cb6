"""The sending end of a link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from time import perf_counter, perf_counter_ns
from typing import Any

from peerllm.errors import FrameError
from peerllm.transport.dial import CLOSE_TIMEOUT_S
from peerllm.transport.frames import Frame, encode_buffers
from peerllm.transport.links.connection import Connection
from peerllm.transport.links.outbox import SEND_TIMEOUT_S, Outbox
from peerllm.transport.links.pulse import Pulse
from peerllm.transport.links.timing import OnTimed, Timing
from peerllm.transport.links.watch import NOBODY_WATCHES, Parting, Watch
from peerllm.transport.links.websocket import (
    BINARY,
    CLOSE,
    GOING_AWAY,
    OK,
    PING,
    PONG,
    Reader,
    control,
    goodbye,
    head,
    read_goodbye,
)
from peerllm.types import DeploymentId, DeviceId

FLUSH_TIMEOUT_S = 2.0  # what an orderly close gives the frames still queued
MAX_ANSWER_BYTES = 1024  # nothing but beats and a close comes back on a link


class Link:
    """Frames to one stage of one deployment's epoch. `send` and `close` may be called from any thread."""

    def __init__(
        self,
        connection: Connection,
        deployment: DeploymentId,
        epoch: int,
        stage: int,
        ended: Callable[[Link, str], None],
        timed: OnTimed | None = None,
        watch: Watch = NOBODY_WATCHES,
    ) -> None:
        """`timed` (on the loop) hears, a few times a second at most, how long a frame of so many bytes took."""
        self.device: DeviceId = connection.device
        self.deployment = deployment
        self.epoch = epoch
        self.stage = stage
        self.lost = ""  # why the link broke; empty while it has not, and after an orderly end
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(connection, self._loop, self._sent, self._cannot_send)
        self._pulse = Pulse(connection, self.beat)
        self.timing = Timing(timed)
        self._watch = watch
        self._number = 0  # of frames sent
        self._reader = Reader(MAX_ANSWER_BYTES, masked=False)
        self._heard_the_end = asyncio.Event()
        self._orderly = self._told = False  # ended by either side on purpose; whoever asked has heard how it ended
        self._ended = ended
        name = f"link to {self.device[:8]} {deployment[:8]}/{epoch}/{stage}"
        self._loop.add_reader(connection.fd, self._read)
        self._task = self._loop.create_task(self._run(name), name=name)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        return bool(self._outbox.ended)

    def send(self, frame: Frame, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Send or queue a frame; its tensors are copied, so their memory may be used again at once.

        Waits only where the queue is full; LinkError if it stays so for `timeout_s`, or the link has ended.
        """
        since = perf_counter_ns()
        buffers = encode_buffers(frame)
        nbytes = sum([len(buffer) for buffer in buffers])
        before = head(BINARY, nbytes, masked=True)
        ping = self._ping(len(before) + nbytes)
        data = b"".join((before, *buffers, ping))
        if self._watch.on:
            encoded = perf_counter_ns()
            parting = Parting(frame.kind, frame.runs, nbytes, since, encoded)
            at_once = self._outbox.put(data, timeout_s, parting)
            queued = encoded if at_once else perf_counter_ns()
            self._watch.queued(self.deployment, self.device, self.stage, parting, queued)
        else:
            self._outbox.put(data, timeout_s)
        if ping:
            self.timing.handed_over(perf_counter())

    def _ping(self, nbytes: int) -> bytes:
        """What goes behind a frame of so many bytes, in one piece with it, to time it; mostly nothing."""
        if not self.timing.wanted or not self._clear():
            return b""
        ping = self.timing.ask(nbytes, perf_counter())
        return b"" if ping is None else control(PING, ping, masked=True)

    def _clear(self) -> bool:
        """Whether what is sent now leaves at once: behind something else it would be the other's time as well."""
        return not self._outbox.busy and not len(self._outbox) and not self._connection.unsent()

    def close(self) -> None:
        """Take no more frames, let those queued go (at most FLUSH_TIMEOUT_S), then end; not reported as lost."""
        self._orderly = True
        self._outbox.end("closed")

    def abort(self, reason: str) -> None:
        """End the link now and report it lost; on the loop only."""
        if not self._told:
            self.lost = self.lost or reason
            self._outbox.end(reason, discard=True)

    async def wait_closed(self) -> None:
        """Until the link has ended."""
        await asyncio.wait({self._task})

    def beat(self) -> None:
        """Give a sign of life, which may ask for one; behind a frame under way it must not wait, and need not."""
        if self._outbox.busy:
            return
        if self._clear() and (ping := self.timing.beat(perf_counter())) is not None:
            self._outbox.say(control(PING, ping, masked=True))
        else:
            self._outbox.say(control(PONG, b"", masked=True))

    async def _run(self, name: str) -> None:
        beat = self._loop.create_task(self._pulse.run(self.abort), name=f"{name} beat")
        try:
            await self._outbox.wait_ended()
            if not self.lost:
                await _at_most(FLUSH_TIMEOUT_S, self._outbox.flushed())
        finally:
            self._outbox.end(self.lost or "closed", discard=True)
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
            self._told = True
            self._ended(self, self.lost)
            try:
                await self._say_goodbye()
            finally:
                self._outbox.detach()
                self._loop.remove_reader(self._connection.fd)
                self._connection.close()

    async def _say_goodbye(self) -> None:
        if self._outbox.busy:  # in the middle of a frame nothing else can be said
            return
        self._outbox.say(control(CLOSE, goodbye(GOING_AWAY if self.lost else OK, self.lost), masked=True))
        await _at_most(CLOSE_TIMEOUT_S, self._heard_the_end.wait())

    def _sent(self, parting: Parting | None, began_ns: int) -> None:
        """By whichever thread wrote the last of it."""
        self._number += 1
        if parting is not None:
            to = self.deployment, self.device, self.stage
            self._watch.sent(*to, self._number, parting, began_ns, perf_counter_ns())

    def _cannot_send(self, reason: str) -> None:
        while not self._connection.closed and not self._heard_the_end.is_set() and self._read():
            pass  # the other side may have said why
        self.abort(reason)

    def _read(self) -> bool:
        """Nothing is expected but beats and the end. Whether there may be more."""
        try:
            data = self._connection.read()
            if data is None:
                return False
            if not data:
                raise ConnectionError
            self._pulse.arrived()
            self._reader.feed(data)
            while (message := self._reader.next()) is not None:
                self._hear(*message)
        except FrameError as error:
            self._over(str(error))
        except OSError as error:
            self._outbox.detach()
            self._over(f"the connection broke{f': {error}' if str(error) else ''}")
        return True

    def _hear(self, opcode: int, payload: bytes | bytearray) -> None:
        if opcode == PONG:
            self.timing.ponged(bytes(payload), perf_counter())
        elif opcode == PING:
            self._outbox.say(control(PONG, bytes(payload), masked=True))
        elif opcode == CLOSE:
            code, reason = read_goodbye(payload)
            if code == OK:
                self._orderly = True
                self._outbox.end("the other side has closed it", discard=True)
                self._over("")
            else:
                self._over(reason or f"closed by the other side (code {code})")
        else:
            self._over("the other side spoke out of turn")

    def _over(self, reason: str) -> None:
        """Nothing more will be heard."""
        self._heard_the_end.set()
        self._loop.remove_reader(self._connection.fd)
        if reason and not self._orderly:
            self.abort(reason)


async def _at_most(seconds: float, wait: Coroutine[Any, Any, object]) -> None:
    try:
        async with asyncio.timeout(seconds):
            await wait
    except TimeoutError:
        return
