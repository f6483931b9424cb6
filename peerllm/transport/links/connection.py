"""A TLS connection that threads use in turn, none of them waiting for it; and how it comes up, on the loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import sys
import threading

from peerllm.types import DeviceId

SIOCOUTQNSD = 0x894B  # linux/sockios.h
_COUNT = struct.Struct("i")


class Connection:
    """Reads and writes what goes without waiting; OSError if it broke. Any thread, but `close` is for the loop's."""

    def __init__(self, sock: ssl.SSLSocket, device: DeviceId) -> None:
        self.device = device  # at the other end
        self.fd = sock.fileno()
        self._sock = sock
        self._lock = threading.Lock()  # OpenSSL lets one thread at a time use a connection
        self.closed = False

    def read(self, room: memoryview) -> int | None:
        """Bytes read into `room`, which has at least a record's, so that nothing stays behind unseen in OpenSSL.

        None: there is nothing now; 0: the other side has ended.
        """
        with self._lock:
            if self.closed:
                return 0
            try:
                return self._sock.read(len(room), room)  # type: ignore[return-value]
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return None

    def write(self, record: memoryview | bytes) -> bool:
        """All of it or nothing; False: not now, and then the same has to be tried again before anything else."""
        with self._lock:
            if self.closed:
                raise ConnectionError("the connection is closed")
            try:
                written = self._sock.write(record)
            except ssl.SSLWantWriteError:
                return False
        if written < len(record):
            raise ConnectionError("a record was written in part")
        return True

    def unsent(self) -> int:
        """Bytes written that still wait here: a frame would wait behind them. 0 where nobody can tell."""
        if sys.platform != "linux":
            return 0
        import fcntl

        try:
            return _COUNT.unpack(fcntl.ioctl(self.fd, SIOCOUTQNSD, bytes(_COUNT.size)))[0]  # type: ignore[no-any-return]
        except OSError:
            return 0

    def close(self) -> None:
        """Give the socket back at once; may be called twice. Nobody may be waiting for it any more."""
        with self._lock:
            self.closed = True
            self._sock.close()


async def ready(sock: socket.socket, *, write: bool = False) -> None:
    """Until there is something to read, or room to write."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    fd = sock.fileno()
    (loop.add_writer if write else loop.add_reader)(fd, wake)
    try:
        await waiter
    finally:
        (loop.remove_writer if write else loop.remove_reader)(fd)


async def handshake(sock: ssl.SSLSocket) -> None:
    """TLS, on a socket that does not block; OSError (ssl.SSLError) if it fails."""
    while True:
        try:
            sock.do_handshake()
            return
        except ssl.SSLWantReadError:
            await ready(sock)
        except ssl.SSLWantWriteError:
            await ready(sock, write=True)


async def read_head(sock: ssl.SSLSocket, end: bytes, limit: int) -> bytes:
    """All up to `end`, behind which nothing may follow yet; ConnectionError if it is longer or does not come."""
    head = b""
    while True:
        try:
            data = sock.read(limit + 1 - len(head))
        except ssl.SSLWantReadError:
            await ready(sock)
            continue
        head += data
        at = head.find(end)
        if at >= 0 and at + len(end) == len(head):
            return head
        if not data or at >= 0 or len(head) > limit:
            raise ConnectionError("no head that ends where it should")
