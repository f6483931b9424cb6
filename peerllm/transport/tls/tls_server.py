"""An aiohttp application behind mutual TLS, whose set of trusted devices can change while it runs."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from aiohttp import web

from peerllm.errors import AuthenticationError
from peerllm.transport.identity import Identity, certificate_device
from peerllm.transport.listening.http_acceptor import Handler, HttpAcceptor
from peerllm.transport.tls.contexts import peer_device, server_context
from peerllm.transport.tls.listen import listen
from peerllm.types import DeviceId

MAX_REQUESTS_PER_DEVICE = 320  # under way at once: more than answers that it may ask for, and control links beside
IDLE_S = 75.0  # a connection may stay open without a request
SHUTDOWN_TIMEOUT_S = 1.0  # handlers get this long to end once their connections are gone


class TlsServer:
    """Serves `app` on every host at one port, to devices given to `set_trusted` and nobody else (at first: nobody).

    A TLS context cannot forget a certificate, so every change of trust makes a new one for the connections that come;
    those of devices that stay trusted live on.
    """

    def __init__(self, app: web.Application, identity: Identity, hosts: Iterable[str], port: int) -> None:
        self._app = app
        self._identity = identity
        self._hosts = tuple(hosts)
        self.port = port  # the real one once it listens, also where 0 was asked for
        self._trusted: dict[DeviceId, str] = {}
        self._runner: web.AppRunner | None = None
        self._sockets: list[socket.socket] = []
        self._acceptor = HttpAcceptor(server_context(identity, ()))
        self._requests: Counter[DeviceId] = Counter()

    async def start(self) -> None:
        """Listen. BadInputError if the port is in use."""
        self._sockets = await listen(self._hosts, self.port)
        self.port = int(self._sockets[0].getsockname()[1])
        # A handshake begun before a removal ends after it: each request is checked against the trust of the moment.
        self._app.middlewares[:0] = (self._acceptor.bounded, self._gate)
        # A handler ends with its connection: what is computed for a device that hung up is computed for nobody.
        self._runner = web.AppRunner(
            self._app,
            access_log=None,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            handler_cancellation=True,
            keepalive_timeout=IDLE_S,
        )
        await self._runner.setup()
        self._acceptor.start(self._runner, self._sockets)

    @property
    def addresses(self) -> list[tuple[int, tuple[Any, ...]]]:
        """Family and address of each listening socket."""
        return [(sock.family, sock.getsockname()) for sock in self._sockets]

    async def set_trusted(self, pems: Iterable[str]) -> None:
        """From now on exactly these certificates (PEM) are let in; live connections of others are cut at once."""
        trusted = {certificate_device(pem): pem for pem in pems}
        if trusted.keys() == self._trusted.keys():
            return
        self._acceptor.context = server_context(self._identity, trusted.values())
        self._trusted = trusted
        if self._runner is not None:
            self._abort(self._runner, trusted)

    async def close(self) -> None:
        """Stop listening and cut every connection."""
        runner, self._runner = self._runner, None
        await self._acceptor.close()
        for sock in self._sockets:
            sock.close()
        if runner is not None:
            self._abort(runner, ())
            await runner.cleanup()

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
        device = peer_device(request)
        if device not in self._trusted:
            if request.transport is not None:
                request.transport.abort()
            raise web.HTTPForbidden
        if self._requests[device] >= MAX_REQUESTS_PER_DEVICE:
            raise web.HTTPServiceUnavailable(text=f"{MAX_REQUESTS_PER_DEVICE} requests of this device are under way")
        self._requests[device] += 1
        try:
            return await handler(request)
        finally:
            self._requests[device] -= 1
            if not self._requests[device]:
                del self._requests[device]
