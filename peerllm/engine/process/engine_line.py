"""The line between a daemon and its engine: length-prefixed JSON over a socketpair, or a pair of in-memory ends.

Either end lives on one event loop; `None` from `receive` means that the other side is gone. `send` never waits, and
raises LinkError if the other side does not keep up or is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from typing import Any

from peerllm.codec import MAX_MESSAGE_BYTES, decode, encode
from peerllm.errors import LinkError

_LENGTH = struct.Struct(">I")
MAX_UNSENT_BYTES = 64 << 20  # a daemon that reads nothing for so long counts as gone
MAX_UNREAD_MESSAGES = 65_536  # the same for the in-memory line


class SocketChannel:
    """An end on a stream socket; `outgoing` and `incoming` are the closed unions of messages each way."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, outgoing: Any, incoming: Any
    ) -> None:
        self._reader, self._writer = reader, writer
        self._outgoing, self._incoming = outgoing, incoming

    @classmethod
    async def on(cls, sock: socket.socket, outgoing: Any, incoming: Any) -> SocketChannel:
        """An end on a connected socket, which it owns from now on."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock)
        return cls(reader, writer, outgoing, incoming)

    def send(self, message: object) -> None:
        if self._writer.is_closing():
            raise LinkError("the line between daemon and engine is closed")
        data = encode(message, self._outgoing)
        if len(data) > MAX_MESSAGE_BYTES:
            raise LinkError(f"{type(message).__name__} of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
        self._writer.write(_LENGTH.pack(len(data)) + data)
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._writer.transport.abort()
            raise LinkError("the other side of the line between daemon and engine does not read")

    async def receive(self) -> Any:
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > MAX_MESSAGE_BYTES:
                raise LinkError(f"message of {length} bytes announced; the limit is {MAX_MESSAGE_BYTES}")
            return decode(await self._reader.readexactly(length), self._incoming)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if isinstance(error, LinkError):  # malformed, not gone: the caller must hear of it
                raise
            return None

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # the loop may be gone already
            self._writer.close()


class MemoryChannel:
    """An end of an in-process line whose two ends may live on two event loops of two threads."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived: deque[object] = deque()
        self._wake = asyncio.Event()
        self._other: MemoryChannel = self
        self._closed = False

    @classmethod
    def pair(cls) -> tuple[MemoryChannel, MemoryChannel]:
        left, right = cls(), cls()
        left._other, right._other = right, left
        return left, right

    def send(self, message: object) -> None:
        if self._closed or self._other._closed:
            raise LinkError("the line between daemon and engine is closed")
        if len(self._other._arrived) >= MAX_UNREAD_MESSAGES:
            raise LinkError("the other side of the line between daemon and engine does not read")
        self._other._arrived.append(message)
        self._other._notify()

    async def receive(self) -> Any:
        self._loop = asyncio.get_running_loop()
        while not self._arrived:
            self._wake.clear()
            if self._arrived:  # arrived between the look and the clear
                break
            if self._closed or self._other._closed:
                return None
            await self._wake.wait()
        return self._arrived.popleft()

    def close(self) -> None:
        self._closed = True
        self._notify()
        self._other._notify()

    def _notify(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # that end's loop has ended: nobody is left to wake
                self._loop.call_soon_threadsafe(self._wake.set)


Channel = SocketChannel | MemoryChannel
