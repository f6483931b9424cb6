"""What comes from unpaired machines and from paired ones gone bad: refused, logged, and the daemon lives on."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from peerllm.codec import encode
from peerllm.daemon.control_messages import (
    Answer,
    Ask,
    Control,
    DeviceView,
    Gossip,
    Heartbeat,
    Hello,
    Place,
    Whereabouts,
)
from peerllm.daemon.decide import membership
from peerllm.daemon.network import control_channel as channel_module
from peerllm.daemon.network.control_channel import FRAME_BYTES, MORE
from peerllm.daemon.network.control_links import MAX_LINKS_PER_DEVICE
from peerllm.daemon.network.limits import message_sizes
from peerllm.errors import LinkError, NotFoundError, RefusedError
from peerllm.transport.dial import dial
from peerllm.transport.identity import load_or_create
from peerllm.transport.tls.contexts import client_context, knock_context
from tests.daemon.networks import WAIT_S, Device, devices, pair

PATHS = ("/", "/control/1", "/control", "/probe/1", "/probe/4194304", "/weights/x", "/v1/models", "/status", "/door")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A websocket driven by hand sends no heartbeats."""
    monkeypatch.setattr(membership, "SILENT_AFTER_S", 60.0)


def text(message: Control) -> str:
    return encode(message, Control).decode()


@asynccontextmanager
async def rogue(anna: Device, bert: Device) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A websocket to anna with bert's proven identity, driven by hand; the real bert is gone."""
    async with aiohttp.ClientSession() as session:
        pem = anna.network.identity.certificate_pem
        websocket = await dial(
            session, bert.network.identity, anna.id, pem, "127.0.0.1", anna.network.port, "/control/99999999999999"
        )
        try:
            yield websocket
        finally:
            await websocket.close()


async def closed(websocket: aiohttp.ClientWebSocketResponse) -> str:
    """Wait for the other side to end it; returns the reason it gave."""
    async with asyncio.timeout(WAIT_S):
        while True:
            message = await websocket.receive()
            if message.type is aiohttp.WSMsgType.CLOSE:
                return str(message.extra)
            if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.ERROR):
                return ""


@asynccontextmanager
async def betrayed(tmp_path: Path) -> AsyncIterator[tuple[Device, Device]]:
    """Anna, and bert whose own network has gone."""
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        await bert.network.close()
        await anna.until(lambda: anna.state(bert) != "online")
        yield anna, bert
        again = Device(tmp_path, "bert", peers=(("127.0.0.1", anna.network.port),))
        try:
            await again.network.start()
            await again.sees(anna)  # the daemon lives on and takes a device that behaves
        finally:
            await again.network.close()


async def test_an_unpaired_client_gets_nothing_on_any_path(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        stranger = load_or_create(tmp_path / "stranger")
        own = client_context(stranger, anna.network.identity.certificate_pem)
        bare = knock_context()
        plain = ssl.create_default_context()
        plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE
        async with aiohttp.ClientSession() as session:
            for context in (own, bare, plain):
                for path in PATHS:
                    with pytest.raises((aiohttp.ClientError, OSError)):
                        await session.get(f"https://127.0.0.1:{anna.network.port}{path}", ssl=context)
            with pytest.raises((aiohttp.ClientError, OSError)):
                await session.get(f"http://127.0.0.1:{anna.network.port}/")
        assert anna.state(bert) == "online"


async def test_a_member_gets_only_what_there_is(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        context = client_context(bert.network.identity, anna.network.identity.certificate_pem)
        base = f"https://127.0.0.1:{anna.network.port}"
        async with aiohttp.ClientSession() as session:
            for path in ("/probe/4194305", "/probe/-1", "/probe/x", "/probe/99999999999", "/control/x", "/nothing"):
                async with session.get(base + path, ssl=context) as response:
                    assert response.status in (400, 404), path
            async with session.get(base + "/probe/1000", ssl=context) as response:
                assert await response.read() == bytes(1000)


async def test_a_member_holds_so_many_links_and_no_more(tmp_path: Path) -> None:
    async with betrayed(tmp_path) as (anna, bert), AsyncExitStack() as stack:
        hello = text(replace(bert.hello(), control_port=1))
        await anna.until(lambda: not anna.network._links._accepted)
        held = []
        for _ in range(MAX_LINKS_PER_DEVICE):
            held.append(await stack.enter_async_context(rogue(anna, bert)))
        with pytest.raises(LinkError, match="503"):
            await stack.enter_async_context(rogue(anna, bert))
        await held[0].close()
        await anna.until(lambda: anna.network._links._accepted[bert.id] < MAX_LINKS_PER_DEVICE)
        again = await stack.enter_async_context(rogue(anna, bert))
        await again.send_str(hello)
        await anna.until(lambda: anna.state(bert) == "online")


@pytest.mark.parametrize(
    "first",
    ["", "{", "[]", '{"type":"Hello"}', '{"type":"Hello","protocol":"1"}', text(Heartbeat(1)), '{"type":"Nobody"}'],
)
async def test_what_is_no_hello_is_refused(tmp_path: Path, first: str) -> None:
    async with betrayed(tmp_path) as (anna, bert), rogue(anna, bert) as websocket:
        await websocket.send_str(first)
        assert await closed(websocket)
        assert anna.state(bert) != "online"


@pytest.mark.parametrize(
    "frame",
    [
        "{",
        '{"type":"Nobody"}',
        '{"type":"Heartbeat","number":"1","echo":false}',
        '{"type":"Heartbeat","number":1,"echo":false,"more":1}',
        '{"type":"Ask","number":1,"body":{"type":"Hello"}}',
        "[" * 30000,
        b"",
        b"\x07part",
        MORE + b"x" * FRAME_BYTES,
        "x" * (FRAME_BYTES + 2),
    ],
    ids=["json", "unknown", "type", "extra", "body", "deep", "empty", "part", "large", "oversize"],
)
async def test_malformed_messages_end_the_link_and_nothing_else(tmp_path: Path, frame: str | bytes) -> None:
    async with betrayed(tmp_path) as (anna, bert), rogue(anna, bert) as websocket:
        await websocket.send_str(text(bert.hello()))
        await anna.sees(bert)
        await (websocket.send_str(frame) if isinstance(frame, str) else websocket.send_bytes(frame))
        await closed(websocket)
        await anna.until(lambda: anna.state(bert) != "online")


async def test_a_message_in_endless_parts_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(message_sizes.MAX_BYTES, "Answer", 300_000)
    async with betrayed(tmp_path) as (anna, bert), rogue(anna, bert) as websocket:
        await websocket.send_str(text(bert.hello()))
        await websocket.send_bytes(MORE + b'{"type":"Answer","reason":"')
        for _ in range(6):
            await websocket.send_bytes(MORE + bytes(60_000))
        assert "the limit is 300000" in await closed(websocket)


async def test_odd_but_legal_messages_change_nothing(tmp_path: Path) -> None:
    async with betrayed(tmp_path) as (anna, bert), rogue(anna, bert) as websocket:
        await websocket.send_str(text(bert.hello()))
        await anna.sees(bert)
        odd: list[Control] = [
            bert.hello(),
            bert.hello(),
            Answer(12345),
            Heartbeat(99, echo=True),
            Gossip(()),
            Whereabouts((Place("f" * 64, ("203.0.113.1",), 1), Place(bert.id, ("x" * 1000,), 70000))),
        ]
        for message in odd:
            await websocket.send_str(text(message))
        view = DeviceView(1, 2, "running", ())
        await websocket.send_str(text(view))
        await anna.until(lambda: anna.network.peers()[bert.id].view == view)
        assert anna.state(bert) == "online" and set(anna.network.peers()) == {bert.id}
        assert all(len(host) < 100 for host in anna.network.peers()[bert.id].hosts)


async def test_a_flood_of_questions_is_bounded(tmp_path: Path) -> None:
    from peerllm.daemon.control_messages import Release

    async with betrayed(tmp_path) as (anna, bert), rogue(anna, bert) as websocket:

        async def never(device: str, question: object) -> Answer:
            await asyncio.Event().wait()
            raise AssertionError

        anna.network.answer_with(never)
        await websocket.send_str(text(bert.hello()))
        for number in range(80):
            await websocket.send_str(text(Ask(number, Release("d", 1))))
        async with asyncio.timeout(WAIT_S):
            while "OverloadedError" not in (await websocket.receive_str()):
                pass


async def test_ranges_of_bytes(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        blob = bytes(range(256)) * 5000
        (tmp_path / "blob").write_bytes(blob)

        async def whole(request: web.Request) -> web.StreamResponse:
            return web.FileResponse(tmp_path / "blob")

        async def short(request: web.Request) -> web.Response:
            return web.Response(body=b"abc")

        async def secret(request: web.Request) -> web.Response:
            raise web.HTTPForbidden

        for device in (anna, bert):
            await device.network.close()
        anna = Device(tmp_path, "anna")
        anna.network.add_route("GET", "/blob", whole)
        anna.network.add_route("GET", "/short", short)
        anna.network.add_route("GET", "/secret", secret)
        bert = Device(tmp_path, "bert")
        await anna.network.start()
        await bert.network.start()
        try:
            await pair(anna, bert)

            async def get(path: str, offset: int, length: int) -> bytes:
                return b"".join([part async for part in bert.network.get(anna.id, path, offset, length)])

            assert await get("/blob", 0, len(blob)) == blob
            assert await get("/blob", 1000, 70_000) == blob[1000:71_000]
            assert await get("/blob", 7, 0) == b""
            with pytest.raises(LinkError, match="ended after"):
                await get("/blob", len(blob) - 10, 20)
            with pytest.raises(LinkError):
                await get("/short", 0, 2)
            with pytest.raises(NotFoundError):
                await get("/nothing", 0, 1)
            with pytest.raises(RefusedError):
                await get("/secret", 0, 1)
            await anna.network.close()
            await bert.until(lambda: bert.state(anna) != "online")
            with pytest.raises(LinkError):
                await get("/blob", 0, 1)
        finally:
            await bert.network.close()
            await anna.network.close()


async def test_hello_must_come_first_and_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "HELLO_TIMEOUT_S", 0.3)
    async with betrayed(tmp_path) as (anna, bert), rogue(anna, bert) as websocket:
        hello = await websocket.receive_str()
        assert '"type":"Hello"' in hello and Hello.__name__ in hello
        assert "no Hello" in await closed(websocket)
        assert anna.state(bert) != "online"
