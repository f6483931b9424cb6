"""Accepting connections for as long as there are descriptors, and waiting a moment when there are none."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

ACCEPT_PAUSE_S = 0.1  # while the system has no more sockets

Take = Callable[[socket.socket, str], None]  # a connection, and its other end's address


async def accept_all(listening: socket.socket, take: Take, make_way: Callable[[], None]) -> None:
    """Until cancelled: hand each connection to `take`. Where no descriptor is left, `make_way` gives one back."""
    while True:
        try:
            connection, address = listening.accept()
        except BlockingIOError:
            await _readable(listening)
            continue
        except (ConnectionAbortedError, InterruptedError):
            continue
        except OSError:  # who waits goes on waiting
            make_way()
            await asyncio.sleep(ACCEPT_PAUSE_S)
            continue
        connection.setblocking(False)
        take(connection, str(address[0]))
        await asyncio.sleep(0)  # others have their turn, however many connections are there


async def _readable(listening: socket.socket) -> None:
    """Unlike the loop's own sock_accept, this stands that the socket is shut down and the wait cancelled at once."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(listening, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(listening)
