"""An aiohttp application behind the acceptor: silent, slow and idle connections, on both event loops."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiohttp import web

from peerllm.transport.identity import Identity
from peerllm.transport.listening import accepting
from peerllm.transport.listening import http_acceptor as module
from peerllm.transport.listening.http_acceptor import HttpAcceptor
from peerllm.transport.tls.contexts import client_context, server_context

MOST = 4
WAIT_S = 10.0
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LOOPS = [asyncio.new_event_loop]
with suppress(ImportError):
    import uvloop

    LOOPS.append(uvloop.new_event_loop)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Served:
    """GET answers at once; GET /wait when told; POST when the body has come."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.acceptor = HttpAcceptor(context, MOST)
        self.go, self.asked = asyncio.Event(), asyncio.Semaphore(0)
        app = web.Application(middlewares=[self.acceptor.bounded])
        app.router.add_get("/", self._get)
        app.router.add_get("/wait", self._wait)
        app.router.add_post("/", self._post)
        app.router.add_post("/wait", self._wait)
        self.runner = web.AppRunner(app, access_log=None, keepalive_timeout=75.0, handler_cancellation=True)
        self.socket = socket.create_server(("0.0.0.0", 0))
        self.port: int = self.socket.getsockname()[1]

    async def _get(self, request: web.Request) -> web.Response:
        return web.Response(text="here")

    async def _wait(self, request: web.Request) -> web.Response:
        await request.read()
        self.asked.release()
        await self.go.wait()
        return web.Response(text="here")

    async def _post(self, request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))


@asynccontextmanager
async def served(context: ssl.SSLContext | None = None) -> AsyncIterator[Served]:
    one = Served(context)
    await one.runner.setup()
    one.acceptor.start(one.runner, (one.socket,))
    try:
        yield one
    finally:
        await one.acceptor.close()
        await one.acceptor.close()
        await one.runner.cleanup()
        one.socket.close()
        assert not one.acceptor._connections and not len(one.acceptor._new) and not len(one.acceptor._idle)


async def connect(one: Served, host: str = "127.0.0.1", **options: Any) -> Streams:
    return await asyncio.open_connection("127.0.0.1", one.port, local_addr=(host, 0), **options)


async def ask(streams: Streams, request: bytes = GET) -> bytes:
    reader, writer = streams
    writer.write(request)
    async with asyncio.timeout(WAIT_S):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return await reader.readexactly(length)


async def ended(streams: Streams) -> bool:
    """Whether the other side has hung up, without a word."""
    try:
        return await asyncio.wait_for(streams[0].read(), WAIT_S) == b""
    except ConnectionError:
        return True


def on(loop: Callable[[], asyncio.AbstractEventLoop], test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(4 * WAIT_S):
            await test()
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1, asyncio.all_tasks()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_silent_connections_make_way_and_those_with_a_request_under_way_never(loop: Any) -> None:
    async def test() -> None:
        async with served() as one:
            streams, asking = [], []
            for _ in range(6):
                streams.append(await connect(one))
                asking.append(asyncio.ensure_future(ask(streams[-1], GET.replace(b"/ ", b"/wait ", 1))))
                await one.asked.acquire()
            silent = [await connect(one) for _ in range(3 * MOST)]
            for mute in silent[: 2 * MOST]:
                assert await ended(mute)
            assert await ask(await connect(one)) == b"here"
            one.go.set()
            assert await asyncio.gather(*asking) == [b"here"] * 6
            for _, writer in (*streams, *silent):
                writer.close()

    on(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_another_address_is_not_pushed_out(loop: Any) -> None:
    async def test() -> None:
        async with served() as one:
            mine = await connect(one, "127.0.0.1")
            flood = [await connect(one, "127.0.0.2") for _ in range(5 * MOST)]
            assert await ended(flood[0])
            assert await ask(mine) == b"here", "though it is the oldest of all that have not asked yet"
            for _, writer in (mine, *flood):
                writer.close()

    on(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_head_that_comes_slowly_has_its_time(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_REQUEST_TIMEOUT_S", 0.2)

    async def test() -> None:
        async with served() as one:
            silent, slow, quick = [await connect(one) for _ in range(3)]
            slow[1].write(GET[:-2])
            assert await ask(quick) == b"here"
            assert await ended(silent) and await ended(slow)
            assert await ask(quick) == b"here", "the time is for the first request only"
            for _, writer in (silent, slow, quick):
                writer.close()

    on(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_idle_connections_and_bodies_that_never_come_make_way_for_others_of_their_kind(loop: Any) -> None:
    async def test() -> None:
        async with served() as one:
            idle = []
            for _ in range(2 * MOST):
                idle.append(await connect(one, "127.0.0.2"))
                assert await ask(idle[-1]) == b"here"
            for streams in idle[:MOST]:
                assert await ended(streams)
            post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab"
            halves = []
            for _ in range(3 * MOST):
                halves.append(await connect(one, "127.0.0.3"))
                halves[-1][1].write(post)
            for streams in halves[:MOST]:
                assert await ended(streams)
            assert await ask(halves[-1], b"cde") == b"5"
            for _, writer in (*idle, *halves):
                writer.close()

    on(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_body_that_has_come_makes_its_request_one_that_is_under_way(loop: Any) -> None:
    async def test() -> None:
        async with served() as one:
            asking = await connect(one)
            asking[1].write(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
            refused = await connect(one)
            assert await ask(refused) == b"here"
            refused[1].write(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab")
            assert b"404" in await refused[0].readuntil(b"\r\n\r\n")
            assert len(one.acceptor._idle) == 2, "its body has not come, and nobody waits for it"
            for _, writer in (asking, refused):
                writer.write(b"cde")
            await one.asked.acquire()
            assert await ask(await connect(one)) == b"here"
            assert len(one.acceptor._idle) == 2, "the refused one and the last"
            for _ in range(2 * MOST):
                assert await ask(await connect(one)) == b"here"
            one.go.set()
            assert (await asking[0].readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            for _, writer in (asking, refused):
                writer.close()

    on(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_tls_that_is_never_done_makes_way(loop: Any, alice: Identity, bob: Identity) -> None:
    async def test() -> None:
        async with served(server_context(alice, [bob.certificate_pem])) as one:
            tls = {"ssl": client_context(bob, alice.certificate_pem), "server_hostname": "x"}
            mine = await connect(one, "127.0.0.1", **tls)
            flood = [await connect(one, "127.0.0.2") for _ in range(5 * MOST)]
            assert await ended(flood[0])
            assert await ask(mine) == b"here"
            assert await ask(await connect(one, "127.0.0.1", **tls)) == b"here"
            flood[-1][1].write(b"this is no TLS")
            assert await asyncio.wait_for(flood[-1][0].read(), WAIT_S) is not None
            for _, writer in (mine, *flood):
                writer.close()

    on(loop, test)


async def test_without_descriptors_one_makes_way_and_the_next_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accepting, "ACCEPT_PAUSE_S", 0.01)
    async with served() as one:
        silent = await connect(one)
        mine = await connect(one)
        assert await ask(mine) == b"here"
        accept, held = socket.socket.accept, [True]

        def exhausted(listening: socket.socket) -> object:
            if held:
                held.clear()
                raise OSError(errno.EMFILE, "Too many open files")
            return accept(listening)

        monkeypatch.setattr(socket.socket, "accept", exhausted)
        assert await ask(await connect(one)) == b"here"
        assert await ended(silent) and await ask(mine) == b"here"


async def test_what_is_gone_is_forgotten() -> None:
    async with served() as one:
        for _ in range(3):
            for request in (b"", b"GET", GET, b"nonsense\r\n\r\n"):
                _, writer = await connect(one)
                writer.write(request)
                writer.close()
        async with asyncio.timeout(WAIT_S):
            while one.acceptor._connections or len(one.acceptor._new) or len(one.acceptor._idle):  # noqa: ASYNC110
                await asyncio.sleep(0)
