"""One control websocket: Hello first both ways, then messages; large ones in parts, so that heartbeats pass between.

What comes is bounded by its class before it is taken in, and by what the other device may send and keep this one busy
with; over that, nothing more is read from it, and TCP makes it wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from peerllm.codec import MAX_MESSAGE_BYTES, decode, encode
from peerllm.daemon.control_messages import Ask, Control, Heartbeat, Hello
from peerllm.daemon.decide.membership_events import LinkName
from peerllm.daemon.network.limits.message_sizes import MOST_OPENING_BYTES, check_class, check_size
from peerllm.daemon.network.limits.traffic_budget import TrafficBudget
from peerllm.errors import LinkError
from peerllm.types import DeviceId

LARGE_BYTES = 256 << 10  # a message of more is decoded in a thread, one at a time of all links
PART_BYTES = 64 << 10  # a text frame holds a whole message of at most this; a binary frame a part of a larger one
MORE, LAST = b"\x01", b"\x00"  # a part's first byte
FRAME_BYTES = PART_BYTES + 1
HELLO_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0  # how long an orderly end waits for the other side's
MAX_QUEUED_MESSAGES = 1024
MAX_QUEUED_BYTES = 4 * MAX_MESSAGE_BYTES
RTT_SAMPLES = 16  # the least of the last ones counts: a busy processor only ever adds to it
MAX_REASON_BYTES = 120  # a websocket's close frame holds 125

WebSocket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse

log = logging.getLogger(__name__)


class ProtocolMismatch(LinkError):
    """The other device speaks another version of the protocol."""

    def __init__(self, theirs: int, ours: int, name: str) -> None:
        older = "it" if theirs < ours else "this device"
        super().__init__(f"{name} speaks protocol {theirs}, this device {ours}: update {older}")


class ReadingShares:
    """What the channels of one device share: the budget of each other device, and who may have a thread decode."""

    def __init__(self) -> None:
        self.decoding = asyncio.Semaphore(1)
        self._budgets: dict[DeviceId, TrafficBudget] = {}  # of the devices that belong or have belonged

    def budget(self, device: DeviceId) -> TrafficBudget:
        """The same for all channels with the device, also for those after these."""
        return self._budgets.setdefault(device, TrafficBudget(time.monotonic()))


class ControlChannel:
    """Messages with one device over one websocket. `run` owns the websocket and its tasks and ends with the reason."""

    def __init__(
        self, websocket: WebSocket, link: LinkName, device: DeviceId, host: str, shares: ReadingShares | None = None
    ) -> None:
        self.link = link
        self.device = device
        self.host = host
        self._websocket = websocket
        self._shares = shares or ReadingShares()
        self._queue: deque[bytes] = deque()
        self._urgent: deque[bytes] = deque()
        self._queued_bytes = 0
        self._wake = asyncio.Event()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._flush: str | None = None
        self._beats: deque[tuple[int, float]] = deque(maxlen=RTT_SAMPLES)
        self._rtts: deque[float] = deque(maxlen=RTT_SAMPLES)
        self._number = 0

    @property
    def ended(self) -> asyncio.Future[str]:
        """Done, with the reason, once nothing is sent or taken any more."""
        return self._ended

    @property
    def rtt_ms(self) -> float | None:
        """The least round trip of the last heartbeats."""
        return min(self._rtts) * 1000 if self._rtts else None

    async def greet(self, hello: Hello) -> Hello:
        """Exchange Hellos. ProtocolMismatch if the versions differ, LinkError if something else came."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await self._websocket.send_str(encode(hello, Control).decode())
                message = await self._websocket.receive()
        except TimeoutError as error:
            raise LinkError(f"no Hello within {HELLO_TIMEOUT_S:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise LinkError(f"lost before its Hello: {error}") from error
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise LinkError(f"closed before its Hello: {_why(message)}")
        theirs = _greeting(message.data, hello.protocol)
        return theirs

    def send(self, message: Control, urgent: bool = False) -> None:
        """Queue a message. LinkError if it is too large; a device that takes nothing any more is cut."""
        data = encode(message, Control)
        check_size(data[:MOST_OPENING_BYTES], len(data))
        if self._ended.done() or self._flush is not None:
            return
        waiting = len(self._queue) + len(self._urgent)
        if waiting >= MAX_QUEUED_MESSAGES or self._queued_bytes + len(data) > MAX_QUEUED_BYTES:
            self.end("it takes no messages any more")
            return
        if urgent:
            self._urgent.append(data)
        else:
            self._queue.append(data)
        self._queued_bytes += len(data)
        self._wake.set()

    def beat(self) -> None:
        """Send a heartbeat."""
        self._number += 1
        self._beats.append((self._number, time.perf_counter()))  # a loop's own clock may only count milliseconds
        self.send(Heartbeat(self._number), urgent=True)

    def end(self, reason: str) -> None:
        """Close now; `run` ends with this reason."""
        if not self._ended.done():
            self._ended.set_result(reason)

    def finish(self, reason: str) -> None:
        """Close once what is queued has been sent."""
        self._flush = reason
        self._wake.set()

    async def run(self, on_heard: Callable[[], None], on_message: Callable[[Control], None]) -> str:
        """Carry messages until the link ends; returns why. A message that is not allowed ends it too."""
        reader = asyncio.create_task(self._read(on_heard, on_message), name=f"control-read-{self.device[:8]}")
        writer = asyncio.create_task(self._write(), name=f"control-write-{self.device[:8]}")
        reason = "closed"
        try:
            done, _ = await asyncio.wait((reader, writer, self._ended), return_when=asyncio.FIRST_COMPLETED)
            reason = self._ended.result() if self._ended in done else next(iter(done)).result()
        except LinkError as error:
            reason = str(error)
            log.warning("control link with %s closed: %s", self.device[:8], reason)
        except (aiohttp.ClientError, OSError) as error:
            reason = f"connection lost: {error}"
        finally:
            self.end(reason)
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            await self._close(reason)
        return reason

    async def _close(self, reason: str) -> None:
        message = reason.encode()[:MAX_REASON_BYTES]
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S + 0.5):
                await self._websocket.close(code=aiohttp.WSCloseCode.POLICY_VIOLATION, message=message)
        except (TimeoutError, RuntimeError, aiohttp.ClientError, OSError):
            pass

    async def _read(self, on_heard: Callable[[], None], on_message: Callable[[Control], None]) -> str:
        parts = bytearray()
        budget = self._shares.budget(self.device)
        while True:
            if (wait_s := budget.wait_s(time.monotonic())) > 0.0:
                await asyncio.sleep(wait_s)
            frame = await self._websocket.receive()
            if frame.type is aiohttp.WSMsgType.TEXT:
                data = frame.data.encode()
            elif frame.type is aiohttp.WSMsgType.BINARY:
                part: bytes = frame.data
                if part[:1] not in (MORE, LAST):
                    raise LinkError("a part of a message that is not allowed")
                parts += memoryview(part)[1:]
                check_size(bytes(parts[:MOST_OPENING_BYTES]), len(parts))
                on_heard()
                if part[:1] == MORE:
                    budget.spend(len(part), 0.0, time.monotonic())
                    continue
                data, parts = bytes(parts), bytearray()
            else:
                return _why(frame)
            check_size(data[:MOST_OPENING_BYTES], len(data))
            if len(data) <= LARGE_BYTES:
                message, busy_s = _decoded(data)
            else:
                async with self._shares.decoding:
                    message, busy_s = await asyncio.to_thread(_decoded, data)
            began = time.thread_time()
            on_heard()
            if isinstance(message, Heartbeat):
                self._heartbeat(message)
            else:
                on_message(message)
            budget.spend(len(frame.data), busy_s + time.thread_time() - began, time.monotonic())

    def _heartbeat(self, beat: Heartbeat) -> None:
        if not beat.echo:
            self.send(Heartbeat(beat.number, echo=True), urgent=True)
            return
        sent = next((at for number, at in self._beats if number == beat.number), None)
        if sent is not None:
            self._rtts.append(time.perf_counter() - sent)

    async def _write(self) -> str:
        while True:
            while self._urgent:
                await self._send_urgent()
            if not self._queue:
                if self._flush is not None:
                    return self._flush
                self._wake.clear()
                await self._wake.wait()
                continue
            data = self._queue.popleft()
            self._queued_bytes -= len(data)
            if len(data) <= PART_BYTES:
                await self._websocket.send_str(data.decode())
                continue
            for start in range(0, len(data), PART_BYTES):
                more = start + PART_BYTES < len(data)
                await self._websocket.send_bytes((MORE if more else LAST) + data[start : start + PART_BYTES])
                while self._urgent:
                    await self._send_urgent()

    async def _send_urgent(self) -> None:
        data = self._urgent.popleft()
        self._queued_bytes -= len(data)
        await self._websocket.send_str(data.decode())


def _decoded(data: bytes) -> tuple[Control, float]:
    """The message, and the seconds that a processor worked on it."""
    began = time.thread_time()
    message: Control = decode(data, Control)
    check_class(data[:MOST_OPENING_BYTES], message.body if isinstance(message, Ask) else message)
    return message, time.thread_time() - began


def _greeting(data: str, ours: int) -> Hello:
    # Another version's Hello may have other fields; its number must still be readable.
    try:
        raw: Any = orjson.loads(data)
    except ValueError as error:
        raise LinkError("malformed message: no JSON") from error
    theirs = raw.get("protocol") if isinstance(raw, dict) and raw.get("type") == "Hello" else None
    if type(theirs) is int and theirs != ours:
        name = raw.get("name")
        raise ProtocolMismatch(theirs, ours, name[:64] if isinstance(name, str) and name.isprintable() else "it")
    hello = decode(data, Control)
    if not isinstance(hello, Hello):
        raise LinkError(f"Hello expected first, not {type(hello).__name__}")
    return hello


def _why(frame: aiohttp.WSMessage) -> str:
    if frame.type is aiohttp.WSMsgType.ERROR:
        return f"connection lost: {frame.data}"
    if frame.type is aiohttp.WSMsgType.CLOSE and frame.extra:
        text = str(frame.extra)[:MAX_REASON_BYTES]
        return f"it closed the link: {text}" if text.isprintable() else "it closed the link"
    return "connection closed"
