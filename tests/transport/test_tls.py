"""Who gets past mutual TLS, and what a change of trust does to the listening port and to live connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
import trustme
from aiohttp import web

from peerllm.errors import AuthenticationError, BadInputError, LinkError
from peerllm.transport.dial import dial
from peerllm.transport.identity import Identity
from peerllm.transport.tls.contexts import client_context, peer_device, server_context
from peerllm.transport.tls.tls_server import TlsServer
from tests.transport.forged import issued_by

WAIT_S = 10.0


async def _echo(request: web.Request) -> web.WebSocketResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    await websocket.send_str(peer_device(request))
    async for message in websocket:
        await websocket.send_str(message.data)
    return websocket


@pytest.fixture
async def server(alice: Identity) -> AsyncIterator[TlsServer]:
    app = web.Application()
    app.router.add_get("/echo", _echo)
    server = TlsServer(app, alice, ["127.0.0.1"], 0)
    await server.start()
    yield server
    await server.close()


Dial = Callable[[Identity], Awaitable[aiohttp.ClientWebSocketResponse]]


@pytest.fixture
def call(server: TlsServer, alice: Identity, session: aiohttp.ClientSession) -> Dial:
    async def call(who: Identity) -> aiohttp.ClientWebSocketResponse:
        return await dial(session, who, alice.device, alice.certificate_pem, "127.0.0.1", server.port, "/echo")

    return call


async def _says(websocket: aiohttp.ClientWebSocketResponse, text: str) -> None:
    await websocket.send_str(text)
    assert await websocket.receive_str(timeout=WAIT_S) == text


async def _gone(websocket: aiohttp.ClientWebSocketResponse) -> None:
    message = await websocket.receive(timeout=WAIT_S)
    assert message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.ERROR)


async def _read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), WAIT_S)
    except ConnectionError:
        return b""


async def _handshake(port: int, context: ssl.SSLContext) -> None:
    """TLS, then one request: in TLS 1.3 a server's refusal of the client arrives with the first read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="x")
    try:
        writer.write(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
        if not await asyncio.wait_for(reader.read(1), WAIT_S):
            raise ConnectionResetError
    finally:
        writer.close()


async def test_a_server_that_trusts_nobody_lets_nobody_in(call: Dial, bob: Identity, alice: Identity) -> None:
    for who in (bob, alice):
        with pytest.raises(LinkError, match="does not know this device"):
            await call(who)


async def test_paired_devices_know_each_other(server: TlsServer, call: Dial, bob: Identity, carol: Identity) -> None:
    await server.set_trusted([bob.certificate_pem])
    websocket = await call(bob)
    assert await websocket.receive_str(timeout=WAIT_S) == bob.device
    await _says(websocket, "hello")
    with pytest.raises(LinkError):
        await call(carol)
    await websocket.close()


async def test_the_client_refuses_an_impostor(
    server: TlsServer, session: aiohttp.ClientSession, bob: Identity, carol: Identity
) -> None:
    await server.set_trusted([bob.certificate_pem])
    with pytest.raises(AuthenticationError, match="another device"):
        await dial(session, bob, carol.device, carol.certificate_pem, "127.0.0.1", server.port, "/echo")


async def test_the_client_compares_the_fingerprint_too(
    server: TlsServer, session: aiohttp.ClientSession, alice: Identity, bob: Identity, carol: Identity
) -> None:
    await server.set_trusted([bob.certificate_pem])
    with pytest.raises(AuthenticationError, match="turned out to be"):
        await dial(session, bob, carol.device, alice.certificate_pem, "127.0.0.1", server.port, "/echo")


async def test_trust_changes_without_closing_port_or_other_links(
    server: TlsServer, call: Dial, bob: Identity, carol: Identity
) -> None:
    port = server.port
    await server.set_trusted([bob.certificate_pem])
    of_bob = await call(bob)
    await of_bob.receive_str()
    await server.set_trusted([bob.certificate_pem, carol.certificate_pem])
    of_carol = await call(carol)
    await of_carol.receive_str()
    await _says(of_bob, "still here")
    await server.set_trusted([carol.certificate_pem])
    await _gone(of_bob)
    await _says(of_carol, "still here")
    with pytest.raises(LinkError):
        await call(bob)
    assert server.port == port
    await of_carol.close()


async def test_no_connection_is_lost_while_trust_changes(
    server: TlsServer, call: Dial, bob: Identity, carol: Identity
) -> None:
    await server.set_trusted([bob.certificate_pem])

    async def flip() -> None:
        for _ in range(10):
            await server.set_trusted([bob.certificate_pem, carol.certificate_pem])
            await server.set_trusted([bob.certificate_pem])

    flipping = asyncio.create_task(flip())
    for _ in range(10):
        websocket = await call(bob)
        assert await websocket.receive_str(timeout=WAIT_S) == bob.device
        await websocket.close()
    await flipping


async def test_a_handshake_begun_before_a_removal_gets_nothing(
    server: TlsServer, alice: Identity, bob: Identity, carol: Identity
) -> None:
    await server.set_trusted([bob.certificate_pem])
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", server.port, ssl=client_context(bob, alice.certificate_pem), server_hostname="x"
    )
    server._trusted.clear()  # as if the removal fell between the end of the handshake and the request
    writer.write(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"101" not in await _read_to_the_end(reader)
    writer.close()


async def test_unpaired_kinds_of_client(server: TlsServer, alice: Identity, bob: Identity, carol: Identity) -> None:
    await server.set_trusted([bob.certificate_pem])
    naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    naked.check_hostname = False
    naked.verify_mode = ssl.CERT_NONE
    old = client_context(bob, alice.certificate_pem)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    foreign = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    foreign.check_hostname = False
    foreign.verify_mode = ssl.CERT_NONE
    trustme.CA().issue_cert("bob").configure_cert(foreign)
    for context in (naked, old, foreign, client_context(carol, alice.certificate_pem)):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await _handshake(server.port, context)
    await _handshake(server.port, client_context(bob, alice.certificate_pem))


async def test_a_certificate_issued_by_a_paired_device_is_no_pass(
    server: TlsServer, alice: Identity, bob: Identity
) -> None:
    """A paired device's key could sign certificates for others; theirs chain to an anchor, which is not enough."""
    await server.set_trusted([bob.certificate_pem])
    context = client_context(bob, alice.certificate_pem)
    issued_by(bob, context)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await _handshake(server.port, context)


async def test_plain_http_gets_nothing(server: TlsServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), WAIT_S)
    assert b"HTTP" not in answer
    writer.close()


async def test_an_unknown_path_is_404_for_members_only(
    server: TlsServer, alice: Identity, bob: Identity, session: aiohttp.ClientSession
) -> None:
    await server.set_trusted([bob.certificate_pem])
    with pytest.raises(LinkError, match="HTTP 404"):
        await dial(session, bob, alice.device, alice.certificate_pem, "127.0.0.1", server.port, "/elsewhere")


async def test_sessions_are_not_resumed(alice: Identity, bob: Identity) -> None:
    context = server_context(alice, [bob.certificate_pem])
    assert context.num_tickets == 0
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.verify_flags & ssl.VERIFY_X509_STRICT


async def test_a_silent_peer_does_not_hold_a_handshake_for_ever(
    alice: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerllm.transport.listening.http_acceptor.FIRST_REQUEST_TIMEOUT_S", 0.2)
    server = TlsServer(web.Application(), alice, ["127.0.0.1"], 0)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), WAIT_S)
    writer.close()
    await server.close()
    await server.close()


async def test_every_address_has_the_same_port(alice: Identity) -> None:
    server = TlsServer(web.Application(), alice, ["127.0.0.1", "127.0.0.2", "localhost"], 0)
    await server.start()
    for host in ("127.0.0.1", "127.0.0.2"):
        _, writer = await asyncio.open_connection(host, server.port)
        writer.close()
    await server.close()


async def test_a_port_in_use_is_one_clear_line(alice: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = rf"^port {port} is in use on 127\.0\.0\.1; choose another with --port N, which takes N to N \+ 2$"
        with pytest.raises(BadInputError, match=line):
            await TlsServer(web.Application(), alice, ["127.0.0.1"], port).start()
    with pytest.raises(BadInputError, match="cannot listen"):
        await TlsServer(web.Application(), alice, ["192.0.2.1"], 0).start()
    with pytest.raises(BadInputError, match="no address"):
        await TlsServer(web.Application(), alice, [], 0).start()


async def test_nobody_there(session: aiohttp.ClientSession, alice: Identity, bob: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(LinkError, match="cannot be reached"):
        await dial(session, bob, alice.device, alice.certificate_pem, "127.0.0.1", port, "/")
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        pytest.raises(LinkError, match=r"did not answer within 0\.2 s"),
    ):
        await dial(
            session,
            bob,
            alice.device,
            alice.certificate_pem,
            "127.0.0.1",
            mute.getsockname()[1],
            "/",
            timeout_s=0.2,
        )


async def test_a_member_cannot_send_this_device_elsewhere(
    server: TlsServer, call: Dial, session: aiohttp.ClientSession, alice: Identity, bob: Identity
) -> None:
    seen: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.Response()

    app = web.Application()
    app.router.add_get("/reboot", elsewhere)
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        await web.SockSite(runner, sock).start()
        target = f"http://127.0.0.1:{sock.getsockname()[1]}/reboot"

        async def redirect(request: web.Request) -> web.Response:
            raise web.HTTPFound(target)

        traitor = web.Application()
        traitor.router.add_get("/echo", redirect)
        other = TlsServer(traitor, alice, ["127.0.0.1"], 0)
        await other.start()
        await other.set_trusted([bob.certificate_pem])
        with pytest.raises(LinkError, match="elsewhere"):
            await dial(session, bob, alice.device, alice.certificate_pem, "127.0.0.1", other.port, "/echo")
        await other.close()
        await runner.cleanup()
    assert not seen


@pytest.mark.parametrize(
    ("host", "port"),
    [("a b", 1), ("a/b", 1), ("a@b", 1), ("", 1), ("x" * 70, 1), ("a..b", 1), ("\0", 1), ("127.0.0.1", 99999)],
)
async def test_an_impossible_address_is_a_link_that_did_not_come_up(
    session: aiohttp.ClientSession, alice: Identity, bob: Identity, host: str, port: int
) -> None:
    with pytest.raises(LinkError):
        await dial(session, bob, alice.device, alice.certificate_pem, host, port, "/")


def test_a_plain_connection_has_no_device() -> None:
    class Plain:
        def get_extra_info(self, name: str, default: object = None) -> object:
            return default

    with pytest.raises(AuthenticationError):
        peer_device(Plain())
