"""A control channel over a websocket that a test holds in its hands: order, bounds, and what comes between parts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from peerllm.codec import decode
from peerllm.daemon.control_messages import Answer, Control, DeviceView, Goodbye, Heartbeat
from peerllm.daemon.decide.membership_events import LinkName
from peerllm.daemon.network import control_channel as module
from peerllm.daemon.network.control_channel import LAST, MORE, PART_BYTES, ControlChannel
from peerllm.daemon.network.limits.message_sizes import SMALL_BYTES
from peerllm.errors import LinkError

A = "a" * 64
BOUND_S = 10.0
LARGE = Answer(1, "", "x" * (2 * PART_BYTES))


class Socket:
    """Notes what is sent; `hold` keeps each send waiting, `on_send` is called with each."""

    def __init__(self) -> None:
        self.sent: list[str | bytes] = []
        self.free, self.news, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.free.set()
        self.on_send: Any = lambda data: None

    async def send_str(self, data: str) -> None:
        await self._send(data)

    async def send_bytes(self, data: bytes) -> None:
        await self._send(data)

    async def _send(self, data: str | bytes) -> None:
        self.sent.append(data)
        self.on_send(data)
        self.news.set()
        await self.free.wait()

    async def receive(self) -> Any:
        await self.closed.wait()
        return SimpleNamespace(type=aiohttp.WSMsgType.CLOSED, extra="", data=None)

    async def close(self, code: int = 0, message: bytes = b"") -> None:
        self.closed.set()

    async def count(self, number: int) -> None:
        async with asyncio.timeout(BOUND_S):
            while len(self.sent) < number:
                self.news.clear()
                await self.news.wait()


@pytest.fixture
def socket() -> Socket:
    return Socket()


@pytest.fixture
async def channel(socket: Socket) -> ControlChannel:
    return ControlChannel(socket, LinkName(A, 1), A, "192.0.2.1")  # type: ignore[arg-type]


def running(channel: ControlChannel) -> asyncio.Task[str]:
    return asyncio.ensure_future(channel.run(lambda: None, lambda message: None))


async def test_a_heartbeat_passes_between_the_parts_of_a_large_message(channel: ControlChannel, socket: Socket) -> None:
    channel.send(LARGE)
    channel.send(Goodbye("after"))
    socket.on_send = lambda data: channel.beat() if len(socket.sent) == 1 else None
    task = running(channel)
    await socket.count(5)
    kinds = [data[:1] if isinstance(data, bytes) else type(decode(data, Control)) for data in socket.sent]
    assert kinds == [MORE, Heartbeat, MORE, LAST, Goodbye]
    whole = b"".join(part[1:] for part in socket.sent if isinstance(part, bytes))
    assert decode(whole, Control) == LARGE
    channel.end("done")
    assert await task == "done"


async def test_a_device_that_takes_nothing_is_cut_at_the_bound_and_not_before(
    channel: ControlChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED_MESSAGES", 3)
    channel.send(Goodbye(""))
    channel.send(Goodbye(""))
    channel.beat()  # waits as well
    assert not channel.ended.done()
    channel.send(Goodbye(""))
    assert channel.ended.result() == "it takes no messages any more"


async def test_what_was_sent_waits_no_more(
    channel: ControlChannel, socket: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED_MESSAGES", 2)
    monkeypatch.setattr(module, "MAX_QUEUED_BYTES", 3 * PART_BYTES)
    task = running(channel)
    for number in range(1, 6):
        channel.send(Answer(1, "", "x" * (PART_BYTES - 300)))
        channel.beat()
        await socket.count(2 * number)
    assert not channel.ended.done() and channel._queued_bytes == 0
    channel.finish("flushed")
    assert await asyncio.wait_for(task, BOUND_S) == "flushed"


async def test_bytes_are_bounded_too(channel: ControlChannel, monkeypatch: pytest.MonkeyPatch) -> None:
    channel.send(Goodbye("x"))
    monkeypatch.setattr(module, "MAX_QUEUED_BYTES", 2 * channel._queued_bytes)
    channel.send(Goodbye("x"))
    assert not channel.ended.done(), "just as many as may wait"
    channel.send(Goodbye(""))
    assert channel.ended.done()


async def test_a_message_too_large_is_the_senders_error_and_the_link_lives(channel: ControlChannel) -> None:
    with pytest.raises(LinkError, match="the limit is"):
        channel.send(Answer(1, "", "x" * module.MAX_MESSAGE_BYTES))
    with pytest.raises(LinkError, match=r"a Goodbye of .* the limit is"):
        channel.send(Goodbye("x" * SMALL_BYTES))
    assert not channel.ended.done()
    channel.send(DeviceView(1, 2, "running", ()))
    assert len(channel._queue) == 1


async def test_the_last_word_is_sent_before_the_end(channel: ControlChannel, socket: Socket) -> None:
    for _ in range(3):
        channel.send(Goodbye("going"))
    channel.finish("going down")
    channel.send(Goodbye("too late"))
    assert await asyncio.wait_for(running(channel), BOUND_S) == "going down"
    assert len(socket.sent) == 3


async def test_round_trips_are_those_of_heartbeats_that_were_sent(channel: ControlChannel) -> None:
    assert channel.rtt_ms is None
    channel._heartbeat(Heartbeat(1, echo=True))
    assert channel.rtt_ms is None, "none was sent"
    for _ in range(module.RTT_SAMPLES + 1):
        channel.beat()
    channel._heartbeat(Heartbeat(1, echo=True))
    assert channel.rtt_ms is None, "that one is long forgotten"
    channel._heartbeat(Heartbeat(2, echo=True))
    assert channel.rtt_ms is not None
    channel._heartbeat(Heartbeat(9))
    assert decode(channel._urgent[-1], Control) == Heartbeat(9, echo=True)
