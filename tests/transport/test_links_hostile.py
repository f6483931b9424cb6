"""Who connects to the data port and does not go on as one should, and links that end in the middle."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from peerllm.errors import LinkError
from peerllm.transport.identity import Identity
from peerllm.transport.links import acceptor as acceptor_module
from peerllm.transport.links.channels import STEP, Delivery, Inlet
from peerllm.transport.tls.contexts import client_context, server_context
from peerllm.transport.websocket.framing import BINARY, CLOSE, PING, POLICY_VIOLATION, TEXT, control, goodbye, head
from tests.transport.frames_support import encode
from tests.transport.planes import DEPLOYMENT, LIMITS, WAIT_S, Node, activation, connect, expect

UPGRADE = (
    f"GET /data/{DEPLOYMENT}/3/1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
).encode()
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def secure(sender: Node, receiver: Node) -> AsyncIterator[Stream]:
    """TLS, and nothing said yet."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1",
        receiver.plane.port,
        ssl=client_context(sender.identity, receiver.identity.certificate_pem),
        server_hostname="x",
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@asynccontextmanager
async def upgraded(sender: Node, receiver: Node) -> AsyncIterator[Stream]:
    """A link, spoken by hand."""
    async with secure(sender, receiver) as (reader, writer):
        writer.write(UPGRADE)
        assert b" 101 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)
        yield reader, writer


async def rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), WAIT_S)
    except (ConnectionError, ssl.SSLError):
        return b""


def message(position: int, tokens: int = 1) -> bytes:
    data = encode(activation(position, tokens))
    return head(BINARY, len(data), masked=True) + data


async def works(sender: Node, receiver: Node) -> None:
    link = await connect(sender, receiver)
    link.send(activation(7))
    assert (await receiver.next_frame()).runs[0].position == 7


@pytest.mark.parametrize("garbage", [b"", b"\0" * 4096, b"GET /echo HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" * 900])
async def test_garbage_instead_of_tls(nodes: list[Node], garbage: bytes) -> None:
    one, two, _ = nodes
    expect(two, one)
    reader, writer = await asyncio.open_connection("127.0.0.1", two.plane.port)
    writer.write(garbage)
    writer.write_eof()
    assert b"HTTP" not in await rest(reader)
    writer.close()
    await works(one, two)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\0" * 100 + b"\r\n\r\n", b"400"),
        (UPGRADE.replace(b"GET", b"PUT"), b"400"),
        (UPGRADE.replace(b"/3/1", b"/3/2"), b"404"),
        (UPGRADE.replace(b"/3/1", b"/3/1?x=1"), b"404"),
        (UPGRADE.replace(b"/3/1", b"/+3/1"), b"404"),
        (UPGRADE.replace(b": 13", b": 12"), b"400"),
        (UPGRADE.replace(b"websocket", b"h2c"), b"400"),
        (UPGRADE[:-2] + b"X: " + b"x" * 1024 + b"\r\n\r\n", None),
        (b"x" * 20_000, None),
        (UPGRADE + message(1), None),  # before it was agreed to
    ],
)
async def test_garbage_instead_of_an_upgrade(nodes: list[Node], said: bytes, status: bytes | None) -> None:
    one, two, _ = nodes
    expect(two, one)
    async with secure(one, two) as (reader, writer):
        writer.write(said)
        answer = await rest(reader)
        assert answer == b"" if status is None else answer.startswith(b"HTTP/1.1 " + status)
    assert not two.plane._links and two.frames.empty()
    await works(one, two)


@pytest.mark.parametrize(
    ("opcode", "payload", "reason"),
    [
        (TEXT, b"hello", "binary frames only"),
        (BINARY, b"PLFR", "shorter than its header"),
        (BINARY, b"", "shorter than its header"),
        (BINARY, encode(activation())[:-8], "not as long as its tensors"),
    ],
)
async def test_text_and_garbage_end_the_link(nodes: list[Node], opcode: int, payload: bytes, reason: str) -> None:
    one, two, _ = nodes
    expect(two, one)
    async with upgraded(one, two) as (reader, writer):
        writer.write(head(opcode, len(payload), masked=True) + payload)
        assert reason in (said := (await two.next_lost())[1])
        assert (await rest(reader)).endswith(goodbye(POLICY_VIOLATION, said)), "the sender hears why"


async def test_a_slow_handshake_and_a_slow_request_are_cut(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    expect(two, one)
    monkeypatch.setattr(acceptor_module, "HANDSHAKE_TIMEOUT_S", 0.3)
    mute, writer = await asyncio.open_connection("127.0.0.1", two.plane.port)
    async with secure(one, two) as (half, half_writer):
        half_writer.write(UPGRADE[:-1])
        assert await rest(half) == b""
    assert await rest(mute) == b""
    writer.close()
    assert not two.plane._acceptor._unfinished
    await works(one, two)


async def test_a_flood_of_handshakes_keeps_nobody_out(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    expect(two, one)
    monkeypatch.setattr(two.plane._acceptor._unfinished, "_most", 4)
    mute = [await asyncio.open_connection("127.0.0.1", two.plane.port) for _ in range(12)]
    await works(one, two)
    assert len(two.plane._acceptor._unfinished) <= 4
    for reader, _ in mute[:8]:
        assert await rest(reader) == b"", "the first make way"
    for _, writer in mute:
        writer.close()


async def test_no_more_sockets_is_a_pause(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    expect(two, one)
    loop, accept = asyncio.get_running_loop(), socket.socket.accept
    refused = asyncio.Event()

    def exhausted(listening: socket.socket) -> object:
        if refused.is_set():
            return accept(listening)
        loop.call_soon(refused.set)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", exhausted)
    first = asyncio.create_task(works(one, two))
    await asyncio.wait_for(refused.wait(), WAIT_S)
    await first
    await works(one, two)


async def test_a_removal_in_the_middle_of_a_handshake(nodes: list[Node]) -> None:
    one, two, three = nodes
    expect(two, one)
    async with secure(one, two) as (reader, writer):
        await two.plane.set_trusted([three.identity.certificate_pem])
        writer.write(UPGRADE)
        assert await rest(reader) == b""
    assert not two.plane._links


@pytest.mark.parametrize("part", [1, 2, 7, 8, 9, 60, 500])
async def test_a_sender_that_stops_in_the_middle_of_a_frame(nodes: list[Node], part: int) -> None:
    one, two, _ = nodes
    expect(two, one)
    async with upgraded(one, two) as (_, writer):
        writer.write(message(1) + message(2)[:part])
        assert (await two.next_frame()).runs[0].position == 1
    assert "broke" in (await two.next_lost())[1]
    assert two.frames.empty()
    await works(one, two)


async def test_a_half_closed_socket_is_a_broken_link(alice: Identity, bob: Identity, nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    context = client_context(one.identity, two.identity.certificate_pem)

    def half() -> None:
        with socket.create_connection(("127.0.0.1", two.plane.port), WAIT_S) as plain:
            secured = context.wrap_socket(plain)
            secured.sendall(UPGRADE)
            secured.recv(4096)
            secured.sendall(message(1))
            secured.shutdown(socket.SHUT_WR)
            socket.socket.recv(secured, 1)  # until the other side has had enough

    await asyncio.to_thread(half)
    assert (await two.next_frame()).runs[0].position == 1
    assert (await two.next_lost())[1] == "the connection broke"


async def test_a_frame_byte_by_byte(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    async with upgraded(one, two) as (_, writer):
        data = message(5) + control(PING, b"", masked=True) + message(6)
        for at in range(len(data)):
            writer.write(data[at : at + 1])
        assert [(await two.next_frame()).runs[0].position for _ in range(2)] == [5, 6]


async def test_what_comes_after_a_broken_rule_is_kept_nowhere(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    async with upgraded(one, two) as (reader, writer):
        (link,) = two.plane._accepted.values()
        writer.write(head(TEXT, 5, masked=True) + bytes(8 << 20))
        assert "binary frames only" in (await two.next_lost())[1]
        await rest(reader)
        assert len(link._inbound._reader._bytes) < 1 << 16


async def test_what_lay_unread_when_a_device_was_removed_is_dropped(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    async with upgraded(one, two) as (_, writer):
        (link,) = two.plane._accepted.values()
        two.plane._poller.remove(link._connection.fd)
        writer.write(message(3))
        assert (await asyncio.to_thread(select.select, [link._connection.fd], [], [], WAIT_S))[0]
        await two.plane.set_trusted([])
        link._inbound.read()
        assert link._inbound.frames == 1 and two.frames.empty()


async def test_frames_that_come_after_the_end_are_dropped(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    async with upgraded(one, two) as (reader, writer):
        forgetting = asyncio.create_task(two.plane.forget(DEPLOYMENT))
        await asyncio.wait_for(reader.readuntil(b"no longer expected"), WAIT_S)
        writer.write(message(3) + head(BINARY, 4, masked=True) + b"PLFR")
        writer.write(control(CLOSE, goodbye(1000, ""), masked=True))
        await asyncio.wait_for(forgetting, WAIT_S)
    assert two.frames.empty() and two.lost.empty()


async def test_pings_nobody_reads_the_answers_to_are_bounded(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    async with upgraded(one, two) as (reader, writer):
        writer.write(control(PING, b"x" * 8, masked=True) * 50_000 + message(9))
        assert (await two.next_frame()).runs[0].position == 9
        (link,) = two.plane._accepted.values()
        assert len(link._outbox._said) <= 1024
        writer.write(control(CLOSE, goodbye(1000, ""), masked=True))
        assert (await rest(reader)).endswith(goodbye(1000, ""))
    assert two.lost.empty()


async def test_a_fault_of_ours_ends_the_link_with_its_name(
    nodes: list[Node], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, _ = nodes

    def deliver(delivery: Delivery) -> None:
        raise KeyError("no such thing")

    two.plane.expect(one.identity.device, Inlet(STEP, LIMITS, deliver))
    link = await connect(one, two)
    link.send(activation())
    assert (await two.next_lost())[1] == "KeyError: 'no such thing'"
    assert (await one.next_lost())[1] == "KeyError: 'no such thing'"
    assert "Traceback" in capsys.readouterr().err


Serve = Callable[[ssl.SSLSocket], None]


def _say(*answers: bytes) -> Serve:
    def serve(sock: ssl.SSLSocket) -> None:
        sock.recv(4096)
        for answer in answers:
            sock.sendall(answer)

    return serve


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (_say(b"SSH-2.0-OpenSSH\r\n\r\n"), "no HTTP"),
        (_say(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n"), "HTTP 302"),
        (_say(b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"), "something else"),
        (_say(b"HTTP/1.1 101 " + b"x" * 9000), "hung up"),
        (_say(), "hung up"),
    ],
)
async def test_a_member_that_answers_wrongly(nodes: list[Node], serve: Serve, reason: str) -> None:
    one, two, _ = nodes
    context = server_context(two.identity, [one.identity.certificate_pem])
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            plain, _ = door.accept()
            with context.wrap_socket(plain, server_side=True) as sock:
                serve(sock)

        answering = asyncio.create_task(asyncio.to_thread(answer))
        who = two.identity
        with pytest.raises(LinkError, match=reason):
            await one.plane.connect(
                who.device, who.certificate_pem, ["127.0.0.1"], door.getsockname()[1], DEPLOYMENT, 3, 1
            )
        await answering


@pytest.mark.parametrize(
    ("host", "port"), [("a b", 1), ("", 1), ("x" * 70, 1), ("a..b", 1), ("\0", 1), ("127.0.0.1", 99999), ("::1%zz", 1)]
)
async def test_an_impossible_address_is_a_link_that_did_not_come_up(nodes: list[Node], host: str, port: int) -> None:
    one, two, _ = nodes
    who = two.identity
    with pytest.raises(LinkError):
        await one.plane.connect(who.device, who.certificate_pem, [host], port, DEPLOYMENT, 3, 1)
