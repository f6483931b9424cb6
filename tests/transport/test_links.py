"""The data plane between real sockets: order, bounds, refusals, and every way a link can end."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import uvloop

from peerllm.errors import AuthenticationError, BadInputError, LinkError, OverloadedError
from peerllm.transport.frames.frame import NamedTensor
from peerllm.transport.identity import Identity
from peerllm.transport.links import data_plane as data_plane_module
from peerllm.transport.links import liveness
from peerllm.transport.links.channels import STEP, Delivery, Inlet
from peerllm.transport.links.connection import Connection
from peerllm.transport.links.data_plane import DataPlane
from peerllm.transport.links.dialling import dial_link
from peerllm.transport.links.echo import ECHO_PATH, MAX_ECHO_BYTES, WARM_UPS
from peerllm.transport.links.frame_timer import LOST_S, FrameTimer, answer
from peerllm.transport.tls.contexts import client_context
from tests.transport.frames_support import encode
from tests.transport.planes import DEPLOYMENT, LIMITS, WAIT_S, WIDTH, Node, activation, connect, expect, link_of


async def test_frames_arrive_in_order_from_a_compute_thread(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    link = await connect(one, two)
    sent = [activation(position, 1 + position % 256) for position in range(100)]

    def compute() -> None:
        for frame in sent:
            link.send(frame)

    await asyncio.to_thread(compute)
    assert [await two.next_frame() for _ in sent] == sent
    link.close()
    await asyncio.wait_for(link.wait_closed(), WAIT_S)
    assert link.closed
    assert not link.lost
    with pytest.raises(LinkError, match="has ended"):
        link.send(sent[0])
    assert one.lost.empty()
    assert two.lost.empty()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_small_frames_wait_for_no_acknowledgement(
    alice: Identity, bob: Identity, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """TCP_NODELAY on both ends of a link, whichever loop the engine runs on."""

    async def both() -> list[int]:
        planes = [DataPlane(identity, ["127.0.0.1"], 0) for identity in (alice, bob)]
        for plane, other in zip(planes, (bob, alice), strict=True):
            await plane.start()
            await plane.set_trusted([other.certificate_pem])
        arrived = asyncio.Event()
        planes[1].expect(alice.device, Inlet(STEP, LIMITS, lambda delivery: arrived.set()))
        link = await planes[0].connect(bob.device, bob.certificate_pem, ["127.0.0.1"], planes[1].port, DEPLOYMENT, 3, 1)
        link.send(activation())
        await asyncio.wait_for(arrived.wait(), WAIT_S)
        (accepted,) = planes[1]._accepted.values()
        ends = link._connection._sock, accepted._connection._sock
        found = [end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for end in ends]
        for plane in planes:
            await plane.close()
        return found

    with asyncio.Runner(loop_factory=loop) as runner:
        assert all(runner.run(both()))


def link_local() -> str | None:
    """An address of this machine that means nothing without its scope."""
    found = (one.address for addresses in psutil.net_if_addrs().values() for one in addresses)
    return next((address for address in found if address.startswith("fe80:") and "%" in address), None)


@pytest.mark.skipif(link_local() is None, reason="no link-local address here")
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_link_local_address_keeps_its_scope(
    alice: Identity, bob: Identity, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """A device is listened for, dialled and timed there."""
    address = link_local()
    assert address is not None

    async def time() -> int:
        planes = [DataPlane(identity, [address], 0) for identity in (alice, bob)]
        for plane, other in zip(planes, (bob, alice), strict=True):
            await plane.start()
            await plane.set_trusted([other.certificate_pem])
        timed = await planes[0].echo(bob.device, bob.certificate_pem, [address], planes[1].port, [512])
        for plane in planes:
            await plane.close()
        return len(timed)

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(time()) == 1


async def test_what_is_queued_still_goes_when_a_link_is_closed(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    link = await connect(one, two)
    for position in range(50):
        link.send(activation(position))
    link.close()
    link.close()
    for position in range(50):
        assert (await two.next_frame()).runs[0].position == position


async def test_a_tensors_memory_may_be_used_again_at_once(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    link = await connect(one, two)
    memory = bytearray(b"\1" * WIDTH * 4)
    link.send(replace(activation(), tensors=(NamedTensor.of("hidden", "F32", (1, WIDTH), memory),)))
    memory[:] = bytes(len(memory))
    assert bytes((await two.next_frame()).tensors[0].data) == b"\1" * WIDTH * 4


async def test_a_bad_frame_ends_its_link_and_nothing_else(nodes: list[Node]) -> None:
    one, two, three = nodes
    expect(two, one)
    expect(two, three, replace(LIMITS, stage=2))
    bad, good = await connect(one, two), await connect(three, two, stage=2)
    bad.send(activation(epoch=4))
    reason = "frame of another epoch: 4, the plan's is 3"
    assert await two.next_lost() == (one.identity.device, reason)
    assert await one.next_lost() == (two.identity.device, reason)
    with pytest.raises(LinkError, match="another epoch"):
        bad.send(activation())
    good.send(replace(activation(), stage=2))
    assert (await two.next_frame()).stage == 2


async def test_only_the_planned_sender_is_let_in(nodes: list[Node]) -> None:
    one, two, three = nodes
    expect(two, one)
    with pytest.raises(AuthenticationError, match="does not let this device in"):
        await connect(three, two)
    await connect(one, two)


@pytest.mark.parametrize("path", [f"{DEPLOYMENT}/4/1", f"{'cd' * 16}/3/1", f"{DEPLOYMENT}/3/2", "x/3/1", ""])
async def test_what_is_not_expected_is_404_before_the_upgrade(nodes: list[Node], path: str) -> None:
    one, two, _ = nodes
    expect(two, one)
    who = two.identity
    with pytest.raises(LinkError, match="HTTP 404"):
        await dial_link(one.identity, who.device, who.certificate_pem, ["127.0.0.1"], two.plane.port, f"/data/{path}")


@pytest.mark.parametrize("claimed_bytes", [LIMITS.max_bytes + 1, 1 << 30, 2**63 - 1])
async def test_a_message_beyond_the_plan_is_refused_before_memory_is_taken(
    nodes: list[Node], claimed_bytes: int
) -> None:
    """The claim alone, of which not one byte of payload follows, ends the link."""
    one, two, _ = nodes
    expect(two, one)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1",
        two.plane.port,
        ssl=client_context(one.identity, two.identity.certificate_pem),
        server_hostname="x",
    )
    writer.write(
        f"GET /data/{DEPLOYMENT}/3/1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n".encode()
    )
    assert b"101 Switching" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
    tracemalloc.start()
    writer.write(b"\x82\xff" + claimed_bytes.to_bytes(8, "big") + bytes(4))
    _, reason = await two.next_lost()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    writer.close()
    assert f"exceeds limit {LIMITS.max_bytes}" in reason
    assert peak_bytes < 1 << 20


async def test_the_largest_frame_passes(nodes: list[Node]) -> None:
    one, two, _ = nodes
    limits = replace(LIMITS, max_runs=1, max_bytes=0)
    expect(two, one, limits)
    assert len(encode(activation(tokens=256))) == limits.max_bytes
    link = await connect(one, two)
    link.send(activation(tokens=256))
    assert (await two.next_frame()).runs[0].length == 256


async def test_what_deliver_raises_ends_the_link(nodes: list[Node]) -> None:
    one, two, _ = nodes

    def deliver(delivery: Delivery) -> None:
        raise OverloadedError("no room for another frame")

    two.plane.expect(one.identity.device, Inlet(STEP, LIMITS, deliver))
    link = await connect(one, two)
    link.send(activation())
    assert await one.next_lost() == (two.identity.device, "no room for another frame")
    assert await two.next_lost() == (one.identity.device, "no room for another frame")


async def test_removal_cuts_live_links_both_ways(nodes: list[Node]) -> None:
    one, two, three = nodes
    expect(two, one)
    expect(one, two, replace(LIMITS, stage=2))
    await connect(one, two)
    await connect(two, one, stage=2)
    await two.plane.set_trusted([three.identity.certificate_pem])
    assert {await two.next_lost() for _ in range(2)} == {
        (one.identity.device, "the device was removed from the household")
    }
    assert {device for device, _ in [await one.next_lost() for _ in range(2)]} == {two.identity.device}
    with pytest.raises(LinkError):
        await connect(one, two)


async def test_a_vanished_sender_is_noticed(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    link = await connect(one, two)
    link.send(activation())
    await two.next_frame()
    await one.plane.close()
    assert (await two.next_lost())[0] == one.identity.device


async def test_a_frozen_peer_is_noticed_by_its_silence(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    monkeypatch.setattr(liveness, "BEAT_S", 0.02)
    monkeypatch.setattr(liveness, "SILENCE_S", 0.2)
    expect(two, one)
    who = two.identity
    # A websocket that nobody reads or beats on: the kernel still acknowledges, as it does for a stopped process.
    path = f"/data/{DEPLOYMENT}/3/1"
    frozen = await dial_link(one.identity, who.device, who.certificate_pem, ["127.0.0.1"], two.plane.port, path)
    _, reason = await two.next_lost()
    assert reason.startswith("nothing heard for 0.")
    frozen.close()


async def test_silence_counts_from_when_the_loop_woke(monkeypatch: pytest.MonkeyPatch) -> None:
    now, steps = 0.0, iter([0.5, 3.0, *[0.5] * 9])

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += next(steps)

    monkeypatch.setattr(liveness, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(liveness, "perf_counter", lambda: now)
    monkeypatch.setattr(liveness, "SILENCE_S", 2.0)
    beats: list[float] = []
    dead: list[str] = []
    await liveness.watch(lambda: 0.0, lambda: beats.append(now), dead.append)
    assert dead == ["nothing heard for 2.5 s"]
    assert beats == [0.5, 3.5, 4.0, 4.5, 5.0, 5.5], "2 s of silence are not too much yet"


async def test_who_cannot_write_any_more_reads_to_the_end(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    link = await connect(one, two)
    (accepted,) = two.plane._accepted.values()
    for end in (link, accepted):
        end._poller.remove(end._connection.fd)
    accepted._connection.close()
    assert (await asyncio.to_thread(select.select, [link._connection.fd], [], [], WAIT_S))[0]
    link._cannot_send("cannot send")
    assert (await one.next_lost())[1].startswith("the connection broke")


async def test_an_idle_link_stays(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    monkeypatch.setattr(liveness, "BEAT_S", 0.02)
    monkeypatch.setattr(liveness, "SILENCE_S", 0.5)
    expect(two, one)
    link = await connect(one, two)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(one.lost.get(), 1.2)
    assert two.lost.empty()
    link.send(activation())
    await two.next_frame()


async def test_forgetting_is_no_loss(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    expect(two, one, replace(LIMITS, epoch=4))
    link = await connect(one, two)
    link.send(activation())
    await two.next_frame()
    await two.plane.forget(DEPLOYMENT, epoch=3)
    await asyncio.wait_for(link.wait_closed(), WAIT_S)
    with pytest.raises(LinkError, match="the other side has closed it"):
        link.send(activation())
    with pytest.raises(LinkError, match="HTTP 404"):
        await connect(one, two)
    assert one.lost.empty()
    assert two.lost.empty()
    who = two.identity
    newer = await one.plane.connect(who.device, who.certificate_pem, ["127.0.0.1"], two.plane.port, DEPLOYMENT, 4, 1)
    await one.plane.forget(DEPLOYMENT)
    assert newer.closed
    assert one.lost.empty()


async def test_a_second_connection_takes_the_firsts_place(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    unused = await connect(one, two)
    used = await connect(one, two)
    await asyncio.wait_for(unused.wait_closed(), WAIT_S)
    used.send(activation())
    await two.next_frame()
    assert two.lost.empty(), "nothing can be missing of a link that never carried a frame"
    newest = await connect(one, two)
    assert await two.next_lost() == (one.identity.device, "replaced by a new connection")
    newest.send(activation(1))
    assert (await two.next_frame()).runs[0].position == 1


async def test_the_first_address_that_answers_is_taken(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    link = await connect(one, two, hosts=("127.0.0.3", "127.0.0.1", "127.0.0.1"))
    link.send(activation())
    await two.next_frame()
    with pytest.raises(LinkError, match=r"127\.0\.0\.3.*cannot be reached: connection refused$"):
        await connect(one, two, hosts=("127.0.0.3", "127.0.0.4"))
    with pytest.raises(LinkError, match="no address"):
        await connect(one, two, hosts=())


async def test_links_expected_are_bounded(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    monkeypatch.setattr(data_plane_module, "MAX_EXPECTED", 1)
    expect(two, one)
    expect(two, one)
    with pytest.raises(BadInputError, match="already expects 1"):
        expect(two, one, replace(LIMITS, stage=2))


async def test_an_echo_times_frames_through_the_real_link(nodes: list[Node]) -> None:
    one, two, _ = nodes
    taken: list[tuple[str, int]] = []

    def deliver(delivery: Delivery) -> None:
        delivery.taken()
        taken.append((link_of(delivery).device, len(delivery.frame.tensors[0].data)))

    two.plane._on_echo = deliver
    who = two.identity
    at = (who.device, who.certificate_pem, ["127.0.0.1"], two.plane.port)
    timed = await one.plane.echo(*at, [1024, 1024, MAX_ECHO_BYTES])
    assert [nbytes >= size for (nbytes, _), size in zip(timed, (1024, 1024, MAX_ECHO_BYTES), strict=True)] == [True] * 3
    assert all(0 <= seconds < WAIT_S for _, seconds in timed)
    assert {device for device, _ in taken} == {one.identity.device}
    assert {size for _, size in taken} == {1024, MAX_ECHO_BYTES} and len(taken) >= 3 + 2 * WARM_UPS
    assert one.lost.empty() and two.lost.empty(), "an echo is no link of a deployment"
    assert not one.plane._links
    assert len(await one.plane.echo(*at, [512])) == 1, "once more, over another connection"


async def test_echoes_of_two_devices_do_not_end_each_other(nodes: list[Node]) -> None:
    two = nodes[1]
    at = (two.identity.device, two.identity.certificate_pem, ["127.0.0.1"], two.plane.port, ECHO_PATH)
    dialled = [await dial_link(node.identity, *at) for node in (nodes[0], nodes[2], nodes[2])]
    assert {link.device for link in two.plane._accepted.values()} == {node.identity.device for node in nodes[::2]}
    assert [link.closed for link in two.plane._accepted.values()] == [False, False]
    for connection in dialled:
        connection.close()


async def test_an_echo_is_bounded_and_for_the_household_only(nodes: list[Node]) -> None:
    one, two, _ = nodes
    who = two.identity
    at = (who.device, who.certificate_pem, ["127.0.0.1"], two.plane.port)
    with pytest.raises(LinkError):
        await one.plane.echo(*at, [MAX_ECHO_BYTES + 1])
    assert two.lost.empty()
    await two.plane.set_trusted([])
    with pytest.raises((LinkError, AuthenticationError)):
        await one.plane.echo(*at, [64])


async def test_frames_in_use_are_timed(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    monkeypatch.setattr(liveness, "BEAT_S", 0.02)
    expect(two, one)
    timed: asyncio.Queue[tuple[int, float]] = asyncio.Queue()
    link = await connect(one, two, timed=timed)
    frame = activation(tokens=3)
    async with asyncio.timeout(WAIT_S):
        while (await timed.get())[0] == 0:  # a PING alone comes first, then the next frame is timed
            await asyncio.to_thread(link.send, frame)
            await two.next_frame()
    link.send(frame)
    assert (await two.next_frame()).runs[0].length == 3


@pytest.mark.parametrize("ahead", [0.0, 1234.5, -9.75])
def test_a_frames_time_is_by_both_clocks(ahead: float) -> None:
    """`ahead`: what the receiver's clock shows more than the sender's."""
    heard: list[tuple[int, float]] = []
    timer = FrameTimer(lambda nbytes, seconds: heard.append((nbytes, seconds)))
    ping = timer.beat(10.0)
    assert ping is not None and not timer.wanted and timer.beat(11.0) is None
    timer.ponged(b"", 10.1)  # the other side's own beat
    timer.ponged(answer(ping, 3.0 + ahead, 10.2 + ahead), 10.4)  # whatever came before a PING alone
    assert timer.wanted and heard == [(0, pytest.approx(0.4))]
    behind = timer.ask(100, 20.0)
    assert behind is not None and behind != ping and not timer.wanted
    assert timer.ask(100, 20.0) is None, "one at a time"
    timer.ponged(ping, 20.2)  # an old one
    timer.ponged(answer(behind, 20.3 + ahead, 20.9 + ahead), 21.5)
    assert heard[1:] == [(100, pytest.approx(0.3))], "how long the answer took is not the frame's"
    behind = timer.ask(100, 21.0)
    assert behind is not None
    timer.handed_over(21.15)
    timer.ponged(answer(behind, 21.25 + ahead, 21.3 + ahead), 21.5)
    assert heard[2:] == [(100, pytest.approx(0.1))], "nor is what handing it over took its sender"
    slow = timer.beat(30.0)
    assert slow is not None
    timer.ponged(answer(slow, 0.0, 30.1 + ahead), 32.0)  # its two ways were far from equal
    behind = timer.ask(100, 33.0)
    assert behind is not None
    timer.ponged(answer(behind, 33.25 + ahead, 33.3 + ahead), 33.5)
    assert heard[4:] == [(100, pytest.approx(0.25))], "the quickest look at the clock counts"
    assert timer.beat(40.0) is not None and timer.beat(40.0 + LOST_S) is not None, "a lost answer is not waited for"
    assert FrameTimer(None).beat(0.0) is None


def test_a_pong_of_another_length_says_nothing() -> None:
    heard: list[tuple[int, float]] = []
    timer = FrameTimer(lambda nbytes, seconds: heard.append((nbytes, seconds)))
    ping = timer.beat(10.0)
    assert ping is not None
    for payload in (ping, ping + bytes(4), ping + bytes(17)):
        timer.ponged(payload, 10.1)
    assert not heard and timer.beat(11.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell")
def test_what_waits_in_the_socket_is_seen() -> None:
    """A frame behind it would count its time as the link's."""
    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname()) as sender:
        reader, _ = door.accept()
        with reader:
            connection = Connection(cast(ssl.SSLSocket, sender), "ab" * 32)
            assert connection.unsent() == 0
            sender.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    sender.send(bytes(1 << 16))
            assert connection.unsent() > 0
        connection.close()
        assert connection.unsent() == 0
