"""The heartbeat thread over sockets on loopback: floods, forgeries, busy loops, and that it is gone after close."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator

import pytest

from peerllm.daemon.network.heartbeats import heartbeat_thread as module
from peerllm.daemon.network.heartbeats.heartbeat_datagram import DATAGRAM_BYTES, HeartbeatPair
from peerllm.daemon.network.heartbeats.heartbeat_thread import HeartbeatThread

A, B = "a" * 64, "b" * 64
HERE = [(socket.AF_INET, ("127.0.0.1", 0))]
BOUND_S = 10.0


class Ear:
    """A HeartbeatThread of device A that knows device B; B is played by the test."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.news = asyncio.Event()
        self.thread = HeartbeatThread(A, self._hear)
        self.thread.start(HERE)
        self.where = self.thread._sockets[0].getsockname()
        half = "22" * 32
        self.thread.set_key(B, half)
        self.pair = HeartbeatPair(B, A, half, self.thread.half_for(B))
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(BOUND_S)

    def _hear(self, device: str) -> None:
        self.heard.append(device)
        self.news.set()

    def say(self, datagram: bytes) -> None:
        self.socket.sendto(datagram, self.where)

    async def hears(self, number: int) -> None:
        async with asyncio.timeout(BOUND_S):
            while len(self.heard) < number:
                self.news.clear()
                await self.news.wait()


@pytest.fixture
async def ear() -> AsyncIterator[Ear]:
    made = Ear()
    yield made
    made.socket.close()
    await made.thread.close()
    await made.thread.close()
    assert "heartbeats" not in {thread.name for thread in threading.enumerate()}


async def test_a_heartbeat_is_heard_and_forged_repeated_and_strange_ones_are_not(ear: Ear) -> None:
    first = ear.pair.next()
    strangers = HeartbeatPair("c" * 64, A, "22" * 32, ear.thread.half_for(B))
    wrong = bytes(DATAGRAM_BYTES), b"", os.urandom(DATAGRAM_BYTES), strangers.next(), first[:-1] + b"\0", first * 2
    for datagram in (*wrong, first, *wrong, first):
        ear.say(datagram)
    await ear.hears(1)
    ear.say(ear.pair.next())
    await ear.hears(2)
    assert ear.heard == [B, B]


async def test_its_own_heartbeats_come_from_the_port_where_it_listens(ear: Ear) -> None:
    ear.thread.set_address(B, "127.0.0.1", ear.socket.getsockname()[1])
    for _ in range(2):
        datagram, sender = await asyncio.to_thread(ear.socket.recvfrom, 2048)
        assert ear.pair.accepts(datagram) and sender == ear.where


async def test_nothing_is_answered_to_anybody(ear: Ear) -> None:
    for datagram in (b"x", ear.pair.next(), os.urandom(DATAGRAM_BYTES)):
        ear.say(datagram)
    await ear.hears(1)
    ear.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        ear.socket.recv(2048)


async def test_it_beats_and_hears_while_the_loop_is_busy(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    ear.thread.set_address(B, "127.0.0.1", ear.socket.getsockname()[1])
    received, told, tell = 0, 0, ear.thread._tell

    def counted() -> None:
        nonlocal told
        told += 1
        tell()

    monkeypatch.setattr(ear.thread, "_tell", counted)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:  # this is the loop's thread, and it does not let go
        ear.say(ear.pair.next())
        ear.socket.settimeout(0.01)
        try:
            received += ear.pair.accepts(ear.socket.recv(2048))
        except TimeoutError:
            continue
    assert received >= 2
    await ear.hears(1)
    await asyncio.sleep(0)
    assert ear.heard == [B] and told == 1, "what came meanwhile is one call, not thousands"


async def test_a_flood_of_garbage_costs_a_bounded_share_of_the_processor(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    take = ear.thread._take

    def counted(datagram: bytes) -> None:
        nonlocal taken
        taken += 1
        take(datagram)

    monkeypatch.setattr(ear.thread, "_take", counted)
    garbage = ear.pair.next()[:-1] + b"\0"
    began = time.monotonic()
    sent = 0
    while time.monotonic() < began + 0.5:
        ear.say(garbage)
        sent += 1
    most = module.MAX_AT_ONCE + (time.monotonic() - began) * module.MAX_PER_S
    assert taken <= most + 1
    if sent > 2 * most:
        assert taken < sent, "the flood was larger than what is read"
    async with asyncio.timeout(BOUND_S):
        while not ear.heard:  # what waits in the socket is read off, and then a real one is heard again
            ear.say(ear.pair.next())
            ear.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ear.news.wait(), 0.1)


async def test_the_same_halves_told_again_do_not_let_old_heartbeats_in(ear: Ear) -> None:
    old = ear.pair.next()
    ear.say(old)
    await ear.hears(1)
    (known,) = ear.thread._pairs.values()
    ear.thread.set_key(B, "22" * 32)
    assert list(ear.thread._pairs.values()) == [known] and not known.accepts(old)
    ear.say(ear.pair.next())
    await ear.hears(2)
    ear.thread.set_key(B, "33" * 32)
    (other,) = ear.thread._pairs.values()
    assert not other.accepts(ear.pair.next())
    ear.say(HeartbeatPair(B, A, "33" * 32, ear.thread.half_for(B)).next())
    await ear.hears(3)


async def test_who_is_forgotten_is_not_heard(ear: Ear) -> None:
    mine = ear.thread.half_for(B)
    ear.thread.set_address(B, "127.0.0.1", 1)
    ear.thread.keep_only(())
    assert not ear.thread._pairs and not ear.thread._addresses
    ear.say(ear.pair.next())
    assert ear.thread.half_for(B) != mine, "a device that comes back gets another key"
    ear.thread.set_key(B, "44" * 32)
    ear.say(HeartbeatPair(B, A, "44" * 32, ear.thread.half_for(B)).next())
    await ear.hears(1)
    assert len(ear.heard) == 1


async def test_without_a_socket_it_is_not_there_and_nothing_fails(ear: Ear, caplog: pytest.LogCaptureFixture) -> None:
    deaf = HeartbeatThread(B, lambda device: None)
    deaf.start([(socket.AF_INET, ear.where)])
    assert "no heartbeats over UDP" in caplog.text
    deaf.set_key(A, "22" * 32)
    deaf.set_address(A, "not an address", 1)
    await deaf.close()
