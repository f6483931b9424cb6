"""Noticing a dead peer. Each side beats, whatever else it does, and counts how long nothing at all has arrived."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable
from time import monotonic

from peerllm.transport.links.connection import Connection

BEAT_S = 0.5  # a PING or an unasked-for PONG: the I/O thread sends it, a busy compute thread does not delay it
SILENCE_S = 2.0  # nothing for so long: the peer is dead, frozen or cut off
COARSE_SILENCE_S = 10.0  # where only what was read can be seen arriving, and reading may have to wait

_INFO = struct.Struct("=52xI")  # Linux struct tcp_info up to tcpi_last_data_recv, ms


class Pulse:
    """How long a connection has been silent, and the beat that keeps the other side from asking itself the same."""

    def __init__(self, connection: Connection, beat: Callable[[], None]) -> None:
        """`beat` sends a sign of life and does not wait."""
        self._beat, self._connection = beat, connection
        self._exact = sys.platform == "linux"
        self._last = monotonic()
        self.reading = True  # False while this side has stopped reading on purpose: then silence is its own

    def arrived(self) -> None:
        """Something arrived, or reading went on after a rest."""
        self._last = monotonic()

    def silent_s(self) -> float:
        """Seconds since anything came from the peer: where the kernel tells, also what nobody has read yet."""
        since_read = monotonic() - self._last
        if not self._exact:
            return since_read
        try:
            info = self._connection.option(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        except OSError:
            return since_read
        return float(min(since_read, _INFO.unpack(info)[0] / 1000))

    async def run(self, dead: Callable[[str], None]) -> None:
        """Beat until cancelled; call `dead` with the reason, once, when the peer is silent."""
        bound_s = SILENCE_S if self._exact else COARSE_SILENCE_S
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
            self._beat()
