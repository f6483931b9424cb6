"""An aiohttp application's connections: those that have no request under way are bounded and make way for others."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from peerllm.transport.listening.accepting import accept_all
from peerllm.transport.listening.waiting_connections import WaitingConnections, most_waiting

FIRST_REQUEST_TIMEOUT_S = 10.0  # from the connection until the head of its first request has come, TLS included

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(eq=False, slots=True)
class _HttpConnection:
    protocol: web.RequestHandler
    host: str
    task: asyncio.Task[None] | None = None
    timer: asyncio.Handle | None = None

    def cut(self) -> None:
        if self.protocol.transport is not None:
            self.protocol.transport.abort()
        elif self.task is not None:  # TLS is not done
            self.task.cancel()


class HttpAcceptor:
    """Put `bounded` before all other middlewares of the runner's application, set the runner up, then `start`.

    A connection counts as new until its first request, as idle after an answer and while a request's body comes; at
    most `most` are new and as many idle. One with a request under way is never cut here.
    """

    def __init__(self, context: ssl.SSLContext | None = None, most: int | None = None) -> None:
        self.context = context  # for connections that come from now on; None: without TLS
        most = most_waiting() if most is None else most
        self._new: WaitingConnections[_HttpConnection] = WaitingConnections(most)
        self._idle: WaitingConnections[_HttpConnection] = WaitingConnections(most)
        self._connections: dict[object, _HttpConnection] = {}
        self._server: web.Server | None = None
        self._accepting: list[asyncio.Task[None]] = []

    def start(self, runner: web.AppRunner, sockets: Iterable[socket.socket]) -> None:
        """Accept on these sockets, which stay the caller's."""
        assert runner.server is not None
        self._server = runner.server
        lost = self._server.connection_lost

        def connection_lost(protocol: web.RequestHandler, error: BaseException | None = None) -> None:
            lost(protocol, error)
            self._forget(protocol)

        self._server.connection_lost = connection_lost  # type: ignore[assignment, method-assign]
        for sock in sockets:
            sock.setblocking(False)
            accepting = accept_all(sock, self._take, self._make_way)
            self._accepting.append(asyncio.create_task(accepting, name="http acceptor"))

    async def close(self) -> None:
        """Accept no more, and cut what has not finished TLS; the rest is the runner's to close. May be called twice."""
        tasks = [*self._accepting, *(one.task for one in self._connections.values() if one.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @web.middleware
    async def bounded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Knows which connections have a request under way."""
        connection = self._connections.get(request.protocol)
        if connection is None:  # it has just been lost
            return await handler(request)
        self._new.discard(connection)
        self._idle.discard(connection)
        if connection.timer is not None:
            connection.timer.cancel()
        under_way = True
        if not request.content.is_eof():
            self._wait(self._idle, connection)
            request.content.on_eof(lambda: self._idle.discard(connection) if under_way else None)
        try:
            return await handler(request)
        finally:
            under_way = False
            if request.protocol in self._connections:
                self._wait(self._idle, connection)

    def _take(self, sock: socket.socket, host: str) -> None:
        assert self._server is not None
        loop = asyncio.get_running_loop()
        connection = _HttpConnection(self._server(), host)
        self._connections[connection.protocol] = connection
        connection.timer = loop.call_later(FIRST_REQUEST_TIMEOUT_S, connection.cut)
        connection.task = loop.create_task(self._connect(sock, connection.protocol), name="http connection")
        connection.task.add_done_callback(lambda _: self._connected(sock, connection))
        self._wait(self._new, connection)

    async def _connect(self, sock: socket.socket, protocol: web.RequestHandler) -> None:
        loop = asyncio.get_running_loop()
        timeout_s = FIRST_REQUEST_TIMEOUT_S if self.context is not None else None
        with suppress(OSError):  # a TLS refusal or its time is over, too
            await loop.connect_accepted_socket(
                lambda: protocol, sock, ssl=self.context, ssl_handshake_timeout=timeout_s
            )

    def _connected(self, sock: socket.socket, connection: _HttpConnection) -> None:
        connection.task = None
        if connection.protocol.transport is None:  # it did not come to that, or is over already
            sock.close()
            self._forget(connection.protocol)

    def _forget(self, protocol: web.RequestHandler) -> None:
        connection = self._connections.pop(protocol, None)
        if connection is not None:
            self._new.discard(connection)
            self._idle.discard(connection)
            if connection.timer is not None:
                connection.timer.cancel()

    def _make_way(self) -> None:
        for waiting in (self._new, self._idle):
            if (connection := waiting.make_way()) is not None:
                connection.cut()
                return

    @staticmethod
    def _wait(waiting: WaitingConnections[_HttpConnection], connection: _HttpConnection) -> None:
        if (crowded := waiting.add(connection, connection.host)) is not None:
            crowded.cut()
