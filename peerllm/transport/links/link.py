"""The sending end of a link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter, perf_counter_ns

import aiohttp

from peerllm.errors import LinkError
from peerllm.transport.dial import CLOSE_TIMEOUT_S
from peerllm.transport.frames import Frame, encode
from peerllm.transport.links.outbox import SEND_TIMEOUT_S, Outbox
from peerllm.transport.links.pulse import Pulse
from peerllm.transport.links.timing import OnTimed, Timing
from peerllm.transport.links.watch import NOBODY_WATCHES, Parting, Watch
from peerllm.types import DeploymentId, DeviceId

MAX_REASON_BYTES = 120  # what a websocket's close frame holds, less its code
FLUSH_TIMEOUT_S = 2.0  # what an orderly close gives the frames still queued
MAX_ANSWER_BYTES = 1024  # nothing but beats and a close comes back on a link


def close_reason(reason: str) -> bytes:
    """A reason cut to what a close frame holds, between characters."""
    return reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()


class Link:
    """Frames to one stage of one deployment's epoch. `send` and `close` may be called from any thread."""

    def __init__(
        self,
        websocket: aiohttp.ClientWebSocketResponse,
        device: DeviceId,
        deployment: DeploymentId,
        epoch: int,
        stage: int,
        ended: Callable[[Link, str], None],
        timed: OnTimed | None = None,
        watch: Watch = NOBODY_WATCHES,
    ) -> None:
        """`timed` (on the loop) hears, a few times a second at most, how long a frame of so many bytes took."""
        self.device = device
        self.deployment = deployment
        self.epoch = epoch
        self.stage = stage
        self.lost = ""  # why the link broke; empty while it has not, and after an orderly end
        self._websocket = websocket
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self._loop)
        self._pulse = Pulse(websocket, self.beat)
        self.timing = Timing(timed)
        self._watch = watch
        self._partings: dict[int, Parting] = {}  # of watched frames in the queue, by the identity of their bytes
        self._ended = ended
        self._task = self._loop.create_task(self._run(), name=f"link to {device[:8]} {deployment[:8]}/{epoch}/{stage}")

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        return bool(self._outbox.ended)

    def send(self, frame: Frame, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Queue a frame; its tensors are copied, so their memory may be used again at once.

        Waits only where the queue is full; LinkError if it stays so for `timeout_s`, or the link has ended.
        """
        since = perf_counter()
        data = encode(frame)
        timed = self.timing.wanted and not len(self._outbox)  # behind others it would be their time as well
        if timed:
            self.timing.mark(data, perf_counter())
        if self._watch.on:
            self._put_watched(frame, data, since, timeout_s)
        else:
            self._outbox.put(data, timeout_s)
        if timed:
            self.timing.handed_over(perf_counter())

    def _put_watched(self, frame: Frame, data: bytes, since: float, timeout_s: float) -> None:
        encoded = perf_counter_ns()
        parting = Parting(frame.kind, frame.segments, len(data), round(since * 1e9), encoded)
        self._partings[id(data)] = parting  # before the writer can have it
        try:
            self._outbox.put(data, timeout_s)
        except LinkError:
            self._partings.pop(id(data), None)
            raise
        self._watch.queued(self.deployment, self.device, self.stage, parting, perf_counter_ns())

    def close(self) -> None:
        """Take no more frames, let those queued go (at most FLUSH_TIMEOUT_S), then end; not reported as lost."""
        self._outbox.end("closed")

    def abort(self, reason: str) -> None:
        """End the link now and report it lost; on the loop only."""
        self.lost = self.lost or reason
        self._outbox.end(reason, discard=True)

    async def wait_closed(self) -> None:
        """Until the link has ended."""
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        name = self._task.get_name()
        writer = self._loop.create_task(self._write(), name=f"{name} writer")
        reader = self._loop.create_task(self._read(), name=f"{name} reader")
        beat = self._loop.create_task(self._pulse.run(self.abort), name=f"{name} beat")
        try:
            await self._outbox.wait_ended()
            if not self.lost:
                await asyncio.wait({writer}, timeout=FLUSH_TIMEOUT_S)
        finally:
            self._outbox.end(self.lost or "closed", discard=True)
            for task in (writer, reader, beat):
                task.cancel()
            await asyncio.gather(writer, reader, beat, return_exceptions=True)
            self._ended(self, self.lost)
            code = aiohttp.WSCloseCode.GOING_AWAY if self.lost else aiohttp.WSCloseCode.OK
            with suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
                goodbye = self._websocket.close(code=code, message=close_reason(self.lost))
                async with asyncio.timeout(2 * CLOSE_TIMEOUT_S):
                    await goodbye

    async def _write(self) -> None:
        try:
            number = 0
            while (frame := await self._outbox.get()) is not None:
                number += 1
                parting = self._partings.pop(id(frame), None) if self._partings else None
                taken = perf_counter_ns() if parting is not None else 0
                await self._websocket.send_bytes(frame)
                if parting is not None:
                    to = self.deployment, self.device, self.stage
                    self._watch.sent(*to, number, parting, taken, perf_counter_ns())
                if (ping := self.timing.sent(frame)) is not None:
                    await self._websocket.ping(ping)
        except (aiohttp.ClientError, ConnectionError, RuntimeError) as error:
            self.abort(f"cannot send: {error}")

    async def beat(self) -> None:
        """Give a sign of life, which may ask for one."""
        if (ping := self.timing.beat(perf_counter())) is not None:
            await self._websocket.ping(ping)
        else:
            await self._websocket.pong()

    async def _read(self) -> None:
        """Nothing is expected but beats and the end."""
        while True:
            message = await self._websocket.receive()
            match message.type:
                case aiohttp.WSMsgType.PONG:
                    self.timing.ponged(bytes(message.data), perf_counter())
                case aiohttp.WSMsgType.PING:
                    await self._websocket.pong(message.data)
                case aiohttp.WSMsgType.CLOSE if message.data == aiohttp.WSCloseCode.OK:
                    self._outbox.end("the other side has closed it", discard=True)
                    return
                case aiohttp.WSMsgType.CLOSE:
                    self.abort(message.extra or f"closed by the other side (code {message.data})")
                    return
                case aiohttp.WSMsgType.CLOSED | aiohttp.WSMsgType.CLOSING:
                    self.abort("the connection broke")
                    return
                case aiohttp.WSMsgType.ERROR:
                    self.abort(f"the connection broke: {message.data}")
                    return
                case _:
                    self.abort("the other side spoke out of turn")
                    return
