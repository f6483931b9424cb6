"""Requests between real Networks: as they come, cut when either side goes, for the household only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import web

from peerllm.daemon.decide.membership_events import LINKED
from peerllm.daemon.network import peer_http
from peerllm.daemon.relay import relay_door
from peerllm.daemon.relay.relay_client import RelayClient
from peerllm.daemon.relay.relay_door import RelayDoor
from peerllm.errors import LinkError
from tests.daemon.networks import WAIT_S, Device, pair

PATH = "/v1/chat/completions"


class Source:
    """Bert answers with a piece whenever the test says so."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[str, str, bytes]] = asyncio.Queue()
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.cancelled = asyncio.Event()
        self.gate = asyncio.Event()  # holds back even the headers
        self.gate.set()

    async def handler(self, request: web.Request, device: str) -> web.StreamResponse:
        request = request.clone(client_max_size=1 << 20)
        self.asked.put_nowait((request.match_info["path"], device, await request.read()))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await self.gate.wait()
            await response.prepare(request)
            while (piece := await self.pieces.get()) is not None:
                await response.write(piece)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        await response.write_eof()
        return response


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[tuple[Device, Device, RelayClient, Source]]:
    async with AsyncExitStack() as stack:
        anna, bert = (Device(tmp_path, name) for name in ("anna", "bert"))
        source, door = Source(), RelayDoor()
        door.handler = source.handler
        bert.network.add_route("POST", relay_door.ROUTE, door.handle)
        for device in (anna, bert):
            await device.network.start()
            stack.push_async_callback(device.network.close)
        client = RelayClient(anna.network.post)
        anna.network.on_state(lambda device, _, state, *__: None if state in LINKED else client.vanished(device))
        await pair(anna, bert)
        yield anna, bert, client, source


async def test_an_answer_comes_as_it_is_given(house: tuple[Device, Device, RelayClient, Source]) -> None:
    anna, bert, client, source = house
    async with asyncio.timeout(WAIT_S), client.ask(bert.id, PATH, {"X": "y"}, b"{}") as answer:
        assert await source.asked.get() == (PATH[1:], anna.id, b"{}")
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
        pieces = aiter(answer.body)
        for said in (b"one", b"two"):
            source.pieces.put_nowait(said)
            assert await anext(pieces) == said, "before the next is given"
        source.pieces.put_nowait(None)
        assert [piece async for piece in pieces] == []
    assert not source.cancelled.is_set()


@pytest.mark.parametrize("begun", [True, False])
async def test_who_leaves_cancels_there(house: tuple[Device, Device, RelayClient, Source], begun: bool) -> None:
    _, bert, client, source = house
    if not begun:
        source.gate.clear()

    async def ask() -> None:
        async with client.ask(bert.id, PATH, {}, b"{}") as answer:
            async for _ in answer.body:
                pass

    task = asyncio.create_task(ask())
    await asyncio.wait_for(source.asked.get(), WAIT_S)
    task.cancel()
    await asyncio.wait_for(source.cancelled.wait(), WAIT_S)


@pytest.mark.parametrize("begun", [True, False])
async def test_a_device_that_goes_ends_its_answers(
    house: tuple[Device, Device, RelayClient, Source], begun: bool
) -> None:
    anna, bert, client, source = house
    if not begun:
        source.gate.clear()

    async def ask() -> None:
        async with client.ask(bert.id, PATH, {}, b"{}") as answer:
            async for _ in answer.body:
                pass

    task = asyncio.create_task(ask())
    await asyncio.wait_for(source.asked.get(), WAIT_S)
    await bert.network.close()
    with pytest.raises(LinkError):
        await asyncio.wait_for(task, WAIT_S)
    await anna.until(lambda: anna.state(bert) != "online")
    with pytest.raises(LinkError):
        await asyncio.wait_for(ask(), WAIT_S)


async def test_news_that_a_device_is_gone_end_what_a_silent_connection_would_not(
    house: tuple[Device, Device, RelayClient, Source],
) -> None:
    _, bert, client, source = house
    source.gate.clear()

    async def ask() -> None:
        async with client.ask(bert.id, PATH, {}, b"{}"):
            raise AssertionError("it answered")

    task = asyncio.create_task(ask())
    await asyncio.wait_for(source.asked.get(), WAIT_S)
    client.vanished("c" * 64)
    await asyncio.sleep(0)
    assert not task.done()
    client.vanished(bert.id)
    with pytest.raises(LinkError, match="gone"):
        await asyncio.wait_for(task, WAIT_S)
    assert not client._scopes


async def test_long_answers_do_not_keep_downloads_waiting(house: tuple[Device, Device, RelayClient, Source]) -> None:
    anna, bert, client, _ = house
    async with AsyncExitStack() as stack:
        for _ in range(40):
            await stack.enter_async_context(client.ask(bert.id, PATH, {}, b"{}"))
        async with asyncio.timeout(WAIT_S):
            got = [piece async for piece in anna.network.get(bert.id, "/probe/1000", 0, 1000)]
    assert sum(map(len, got)) == 1000


async def test_before_there_is_an_api_it_is_503(house: tuple[Device, Device, RelayClient, Source]) -> None:
    anna, bert, _, _ = house
    back = RelayClient(bert.network.post)
    async with back.ask(anna.id, PATH, {}, b"{}") as answer:
        assert answer.status == 404, "nothing is served there"
    door = RelayDoor()
    with pytest.raises(web.HTTPServiceUnavailable):
        await door.handle(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("stuck", ["body", "headers", "answer"])
async def test_a_device_that_says_nothing_of_an_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: str
) -> None:
    """Before it has taken what is asked, before its headers, and in the middle; a word now and then is enough."""
    monkeypatch.setattr(peer_http, "ANSWER_STALL_S", 0.4)
    monkeypatch.setattr(peer_http, "UPLOAD_TIMEOUT_S", 0.3 if stuck == "body" else 30.0)
    words, never = asyncio.Queue[bytes](), asyncio.Event()

    async def quiet(request: web.Request) -> web.StreamResponse:
        if stuck != "body":
            await request.clone(client_max_size=1 << 30).read()
        response = web.StreamResponse()
        if stuck != "answer":
            await never.wait()
        await response.prepare(request)
        while True:
            await response.write(await words.get())

    async with AsyncExitStack() as stack:
        anna, bert = (Device(tmp_path, name) for name in ("anna", "bert"))
        bert.network.add_route("POST", "/api/quiet", quiet)
        for device in (anna, bert):
            await device.network.start()
            stack.push_async_callback(device.network.close)
        await pair(anna, bert)
        client, body = RelayClient(anna.network.post), bytes(64 << 20 if stuck == "body" else 10)

        async def ask() -> list[bytes]:
            async with client.ask(bert.id, "/quiet", {}, body) as answer:
                return [piece async for piece in answer.body]

        for number in range(7):
            asyncio.get_running_loop().call_later(0.1 * number, words.put_nowait, b" ")
        began = time.monotonic()
        with pytest.raises(LinkError, match=r"says nothing|was lost"):
            await asyncio.wait_for(ask(), WAIT_S)
        assert time.monotonic() - began > (0.95 if stuck == "answer" else 0.25)


async def test_the_patience_for_a_body_is_not_that_for_an_answer(
    house: tuple[Device, Device, RelayClient, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bert, client, source = house
    monkeypatch.setattr(peer_http, "UPLOAD_TIMEOUT_S", 0.2)
    source.gate.clear()
    async with asyncio.timeout(WAIT_S):
        asyncio.get_running_loop().call_later(0.5, source.gate.set)
        async with client.ask(bert.id, PATH, {}, b"x" * (600 << 10)) as answer:
            assert answer.status == 200 and len((await source.asked.get())[2]) == 600 << 10
