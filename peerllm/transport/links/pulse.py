"""Noticing a dead peer. Each side beats, whatever else it does, and counts how long nothing at all has arrived."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic

import aiohttp
from aiohttp import web

BEAT_S = 0.5  # a PING or an unasked-for PONG: the I/O thread sends it, a busy compute thread does not delay it
SILENCE_S = 2.0  # nothing for so long: the peer is dead, frozen or cut off
COARSE_SILENCE_S = 10.0  # where only whole messages can be seen arriving, and a large one may take its time

_INFO = struct.Struct("=52xI")  # Linux struct tcp_info up to tcpi_last_data_recv, ms

WebSocket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


class Pulse:
    """How long a connection has been silent, and the beat that keeps the other side from asking itself the same."""

    def __init__(self, websocket: WebSocket, beat: Callable[[], Awaitable[None]] | None = None) -> None:
        """`beat` sends a sign of life; an unasked-for PONG if none is given."""
        self._beat = beat or websocket.pong
        self._socket = _duplicate(websocket)
        self._last = monotonic()
        self.reading = True  # False while this side has stopped reading on purpose: then silence is its own

    def arrived(self) -> None:
        """A message arrived, or reading went on after a rest."""
        self._last = monotonic()

    def silent_s(self) -> float:
        """Seconds since anything came from the peer: bytes where the kernel tells, else whole messages."""
        since_message = monotonic() - self._last
        if self._socket is None:
            return since_message
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        except OSError:
            return since_message
        return float(min(since_message, _INFO.unpack(info)[0] / 1000))

    async def run(self, dead: Callable[[str], None]) -> None:
        """Beat until cancelled; call `dead` with the reason, once, when the peer is silent."""
        bound_s = COARSE_SILENCE_S if self._socket is None else SILENCE_S
        try:
            while True:
                before = monotonic()
                await asyncio.sleep(BEAT_S)
                if monotonic() - before > 2 * BEAT_S:
                    self._last = monotonic()  # it was this loop that slept
                if not self.reading:
                    self._last = monotonic()
                elif (silent_s := self.silent_s()) > bound_s:
                    dead(f"nothing heard for {silent_s:.1f} s")
                    return
                # Behind a full send buffer the beat must not wait: the frames there are sign of life enough.
                with suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
                    async with asyncio.timeout(BEAT_S):
                        await self._beat()
        finally:
            if self._socket is not None:
                self._socket.close()


def _duplicate(websocket: WebSocket) -> socket.socket | None:
    """The connection's socket to ask the kernel about (uvloop's own objects cannot be asked)."""
    sock = websocket.get_extra_info("socket")
    if sys.platform != "linux" or sock is None:
        return None
    try:
        return socket.socket(fileno=os.dup(sock.fileno()))
    except OSError:
        return None
