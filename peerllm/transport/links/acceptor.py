"""Taking in connections from other devices: mutual TLS, then the upgrade, each within bounds and time."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from peerllm.errors import AuthenticationError
from peerllm.transport.identity import Identity
from peerllm.transport.links.connection import Connection, handshake, read_head
from peerllm.transport.listening.accepting import accept_all
from peerllm.transport.listening.waiting_connections import WaitingConnections, most_waiting
from peerllm.transport.tls.contexts import peer_device, server_context
from peerllm.transport.tls.listen import listen
from peerllm.transport.websocket.upgrade import END, MAX_HEAD_BYTES, DeclinedError, agreed, declined, read_request
from peerllm.types import DeviceId

HANDSHAKE_TIMEOUT_S = 10.0  # TLS and the request together

Admit = Callable[[Connection], None]
Route = Callable[[DeviceId, str], Admit]  # who asks for which path; DeclinedError


class Acceptor:
    """Listens on every host at one port. Devices given to `set_trusted` get in and nobody else (at first: nobody).

    Who asks for a websocket where `route` has one is handed to what that returns.
    """

    def __init__(self, identity: Identity, hosts: Iterable[str], port: int, route: Route) -> None:
        self._identity, self._hosts, self._route = identity, tuple(hosts), route
        self.port = port  # the real one once it listens, also where 0 was asked for
        self._trusted: frozenset[DeviceId] = frozenset()
        self._context = server_context(identity, ())
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._unfinished: WaitingConnections[asyncio.Task[None]] = WaitingConnections(most_waiting())

    async def start(self) -> None:
        """Listen. BadInputError if the port is in use."""
        self._sockets = await listen(self._hosts, self.port)
        self.port = int(self._sockets[0].getsockname()[1])
        loop = asyncio.get_running_loop()
        accepting = [accept_all(one, self._take, self._make_way) for one in self._sockets]
        self._accepting = [loop.create_task(one, name="link acceptor") for one in accepting]

    def set_trusted(self, trusted: Mapping[DeviceId, str]) -> None:
        """From now on exactly these certificates (PEM) are let in; a context cannot forget one, so it is made anew."""
        if trusted.keys() != self._trusted:
            self._trusted = frozenset(trusted)
            self._context = server_context(self._identity, trusted.values())

    async def close(self) -> None:
        """Stop listening and cut what is not a link yet."""
        tasks = [*self._accepting, *self._unfinished]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in self._sockets:
            sock.close()
        self._sockets = []

    def _take(self, plain: socket.socket, host: str) -> None:
        task = asyncio.get_running_loop().create_task(self._admit(plain), name="link handshake")
        task.add_done_callback(self._unfinished.discard)
        task.add_done_callback(lambda _: plain.close())  # an admitted one has been taken over by TLS
        if (crowded := self._unfinished.add(task, host)) is not None:
            crowded.cancel()

    def _make_way(self) -> None:
        if (task := self._unfinished.make_way()) is not None:
            task.cancel()

    async def _admit(self, plain: socket.socket) -> None:
        sock: socket.socket = plain
        admitted = False
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                plain.setblocking(False)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                secure = sock = self._context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
                await handshake(secure)
                head = await read_head(secure, END, MAX_HEAD_BYTES)
            admitted = self._answer(secure, head)
        except (OSError, TimeoutError, AuthenticationError, ValueError):
            return
        finally:
            if not admitted:
                _hang_up(sock)

    def _answer(self, sock: ssl.SSLSocket, head: bytes) -> bool:
        """Whether it is a link now. An answer fits into the socket of a new connection."""
        device = peer_device(sock)
        # A handshake begun before a removal may end after it: the trust of the moment counts.
        if device not in self._trusted:
            raise AuthenticationError("not of this household any more")
        try:
            path, key = read_request(head)
            admit = self._route(device, path)
        except DeclinedError as error:
            with suppress(OSError):
                sock.write(declined(error.status))
            return False
        sock.write(agreed(key))
        admit(Connection(sock, device))
        return True


def _hang_up(sock: socket.socket) -> None:
    """Closed with bytes unread, the system would take back what was said last, a TLS alert or an answer."""
    with suppress(OSError, ValueError):
        socket.socket.recv(sock, MAX_HEAD_BYTES)
    sock.close()
