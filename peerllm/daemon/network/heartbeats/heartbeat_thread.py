"""The thread that sends and takes heartbeat datagrams, whatever the event loop does meanwhile."""

from __future__ import annotations

import asyncio
import logging
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

from peerllm.daemon.decide.membership import HEARTBEAT_S
from peerllm.daemon.network.heartbeats.heartbeat_datagram import (
    DATAGRAM_BYTES,
    SENDER_BYTES,
    HeartbeatPair,
    new_half,
    sender_of,
)
from peerllm.types import DeviceId

Address = tuple[int, tuple[Any, ...]]  # family, and what `bind` or `sendto` takes

MAX_PER_S = 1024.0  # datagrams read a second: 64 devices send a quarter of that; a flood waits in the socket or is lost
MAX_AT_ONCE = 256.0
JOIN_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class HeartbeatThread:
    """Methods are for the loop; `on_heard` is called on it, soon after a device's heartbeat came.

    Datagrams of unknown senders, forged and repeated ones are dropped without an answer. Where no socket can be had,
    nothing is sent or heard.
    """

    def __init__(self, me: DeviceId, on_heard: Callable[[DeviceId], None]) -> None:
        self._me = me
        self._on_heard = on_heard
        self._halves: dict[DeviceId, str] = {}
        self._lock = threading.Lock()
        self._pairs: dict[bytes, HeartbeatPair] = {}
        self._addresses: dict[bytes, Address] = {}
        self._heard: set[DeviceId] = set()
        self._sockets: list[socket.socket] = []
        self._bell: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False

    def start(self, addresses: Iterable[Address]) -> None:
        """Open a socket at each address (of the control port) and begin."""
        for family, address in addresses:
            try:
                self._sockets.append(_bound(family, address))
            except OSError as error:
                log.warning("no heartbeats over UDP at %s port %s: %s", address[0], address[1], error.strerror)
        if not self._sockets:
            return
        self._loop = asyncio.get_running_loop()
        self._bell = socket.socketpair()
        self._bell[0].setblocking(False)
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """End the thread and give the sockets back; can be called twice."""
        self._closing = True
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ring()
            await asyncio.to_thread(thread.join, JOIN_TIMEOUT_S)
        bell, self._bell = self._bell, None
        for sock in (*self._sockets, *(bell or ())):
            sock.close()
        self._sockets = []

    def half_for(self, device: DeviceId) -> str:
        """This device's half of the key, to be told to the other over the control link."""
        return self._halves.setdefault(device, new_half())

    def set_key(self, device: DeviceId, their_half: str) -> None:
        """The other device's half, told over the control link. BadInputError if it is none."""
        mine, name = self.half_for(device), _short(device)
        with self._lock:
            known = self._pairs.get(name)
            if known is None or known.halves != (mine, their_half):  # the same halves go on with the same numbers
                self._pairs[name] = HeartbeatPair(self._me, device, mine, their_half)
        self._ring()

    def set_address(self, device: DeviceId, host: str, port: int) -> None:
        """Where its control link leads to."""
        with suppress(OSError, UnicodeError):
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
            with self._lock:
                self._addresses[_short(device)] = found[0][0], found[0][4]

    def keep_only(self, devices: Collection[DeviceId]) -> None:
        """Forget every other device."""
        names = {_short(device) for device in devices}
        self._halves = {device: half for device, half in self._halves.items() if device in devices}
        with self._lock:
            self._pairs = {name: pair for name, pair in self._pairs.items() if name in names}
            self._addresses = {name: address for name, address in self._addresses.items() if name in names}

    def _ring(self) -> None:
        if self._bell is not None:
            with suppress(OSError):
                self._bell[0].send(b"\0")

    def _tell(self) -> None:
        with self._lock:
            heard, self._heard = self._heard, set()
        for device in heard:
            self._on_heard(device)

    # ---- on the thread ----

    def _run(self) -> None:
        assert self._bell is not None
        bell = self._bell[1]
        with selectors.DefaultSelector() as bells, selectors.DefaultSelector() as all_sockets:
            for sock in (bell, *self._sockets):
                all_sockets.register(sock, selectors.EVENT_READ)
            bells.register(bell, selectors.EVENT_READ)
            beat_at = refilled_at = monotonic()
            budget = MAX_AT_ONCE
            while not self._closing:
                now = monotonic()
                budget = min(MAX_AT_ONCE, budget + (now - refilled_at) * MAX_PER_S)
                refilled_at = now
                if now >= beat_at:
                    self._beat()
                    beat_at = max(beat_at + HEARTBEAT_S, now)
                selector = all_sockets if budget >= 1.0 else bells
                wait_s = beat_at - now if budget >= 1.0 else min(beat_at - now, MAX_AT_ONCE / MAX_PER_S)
                for key, _ in selector.select(max(0.0, wait_s) if self._pairs else None):
                    if key.fileobj is bell:
                        bell.recv(64)
                    else:
                        budget -= self._read(key.fileobj, int(budget))  # type: ignore[arg-type]

    def _beat(self) -> None:
        with self._lock:
            reachable = self._pairs.keys() & self._addresses.keys()
            due = [(*self._addresses[name], self._pairs[name].next()) for name in reachable]
        for family, address, datagram in due:
            for sock in self._sockets:
                if sock.family == family:
                    try:
                        sock.sendto(datagram, address)
                        break
                    except OSError:  # not from this address of ours, or no way there: it is only not heard
                        continue

    def _read(self, sock: socket.socket, limit: int) -> int:
        """How many datagrams were taken, at most `limit`."""
        for count in range(limit):
            try:
                datagram = sock.recv(DATAGRAM_BYTES + 1)
            except BlockingIOError:
                return count
            except OSError:  # an ICMP answer to what was sent, on some systems
                continue
            self._take(datagram)
        return limit

    def _take(self, datagram: bytes) -> None:
        sender = sender_of(datagram)
        with self._lock:
            pair = self._pairs.get(sender) if sender is not None else None
            if pair is None or not pair.accepts(datagram):
                return
            first = not self._heard  # one call to the loop at a time, however long it takes to come to it
            self._heard.add(pair.device)
        if first and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._tell)


def _short(device: DeviceId) -> bytes:
    return bytes.fromhex(device)[:SENDER_BYTES]


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        sock.setblocking(False)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock
