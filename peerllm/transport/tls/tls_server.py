"""An aiohttp application behind mutual TLS, whose set of trusted devices can change while it runs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any

from aiohttp import web

from peerllm.errors import AuthenticationError
from peerllm.transport.identity import Identity, certificate_device
from peerllm.transport.tls.contexts import peer_device, server_context
from peerllm.transport.tls.listen import BACKLOG, listen
from peerllm.types import DeviceId

HANDSHAKE_TIMEOUT_S = 10.0  # a peer that connects and says nothing
SHUTDOWN_TIMEOUT_S = 1.0  # handlers get this long to end once their connections are gone

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class TlsServer:
    """Serves `app` on every host at one port, to devices given to `set_trusted` and nobody else (at first: nobody).

    A TLS context cannot forget a certificate, so every change of trust starts a new acceptor on the same listening
    sockets: none closes, and connections of devices that stay trusted live on.
    """

    def __init__(self, app: web.Application, identity: Identity, hosts: Iterable[str], port: int) -> None:
        self._app = app
        self._identity = identity
        self._hosts = tuple(hosts)
        self.port = port  # the real one once it listens, also where 0 was asked for
        self._trusted: dict[DeviceId, str] = {}
        self._runner: web.AppRunner | None = None
        self._sockets: list[socket.socket] = []
        self._acceptors: list[asyncio.AbstractServer] = []
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Listen. BadInputError if the port is in use."""
        self._sockets = await listen(self._hosts, self.port)
        self.port = int(self._sockets[0].getsockname()[1])
        # A handshake begun before a removal ends after it: each request is checked against the trust of the moment.
        self._app.middlewares.insert(0, self._gate)
        # A handler ends with its connection: what is computed for a device that hung up is computed for nobody.
        self._runner = web.AppRunner(
            self._app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S, handler_cancellation=True
        )
        await self._runner.setup()
        async with self._changing:
            await self._accept()

    @property
    def addresses(self) -> list[tuple[int, tuple[Any, ...]]]:
        """Family and address of each listening socket."""
        return [(sock.family, sock.getsockname()) for sock in self._sockets]

    async def set_trusted(self, pems: Iterable[str]) -> None:
        """From now on exactly these certificates (PEM) are let in; live connections of others are cut at once."""
        trusted = {certificate_device(pem): pem for pem in pems}
        if trusted.keys() == self._trusted.keys():
            return
        self._trusted = trusted
        if self._runner is not None:
            self._abort(self._runner, trusted)
            async with self._changing:
                await self._accept()

    async def close(self) -> None:
        """Stop listening and cut every connection."""
        runner, self._runner = self._runner, None
        async with self._changing:
            self._stop_accepting()
            for sock in self._sockets:
                sock.close()
        if runner is not None:
            self._abort(runner, ())
            await runner.cleanup()

    async def _accept(self) -> None:
        self._stop_accepting()
        if self._runner is None or self._runner.server is None:
            return
        context = server_context(self._identity, self._trusted.values())
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            # The duplicate shares the kernel's queue: who connects between two acceptors waits there.
            acceptor = await loop.create_server(
                self._runner.server,
                sock=sock.dup(),
                ssl=context,
                backlog=BACKLOG,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )
            self._acceptors.append(acceptor)

    def _stop_accepting(self) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        self._acceptors.clear()

    def _abort(self, runner: web.AppRunner, trusted: Collection[DeviceId]) -> None:
        """Cut all connections but those of devices that are trusted."""
        for connection in runner.server.connections if runner.server is not None else ():
            if (transport := connection.transport) is not None:
                try:
                    device = peer_device(transport)
                except AuthenticationError:
                    device = ""
                if device not in trusted:
                    transport.abort()

    @web.middleware
    async def _gate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if peer_device(request) not in self._trusted:
            if request.transport is not None:
                request.transport.abort()
            raise web.HTTPForbidden
        return await handler(request)
