"""Websocket messages (RFC 6455) after the upgrade: heads out, whole messages in. Sans-I/O.

Nothing is compressed or sent in fragments, and neither is accepted. What a client sends carries a mask, as the RFC
wants of it for the sake of proxies; inside TLS there are none, so it is zero, and another is refused.
"""

from __future__ import annotations

from peerllm.errors import FrameError

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
OK, GOING_AWAY, POLICY_VIOLATION, INTERNAL_ERROR = 1000, 1001, 1008, 1011  # codes of a CLOSE
MAX_CONTROL_BYTES = 125  # of a PING, PONG or CLOSE
MAX_REASON_BYTES = 120  # what a CLOSE holds, less its code
RECORD_BYTES = 1 << 14  # of TLS: what one read of a connection brings at most
_FINAL, _RESERVED, _MASKED = 0x80, 0x70, 0x80
_NO_MASK = bytes(4)

Message = tuple[int, bytes | bytearray]  # opcode, payload


def head(opcode: int, nbytes: int, masked: bool) -> bytes:
    """What goes before a payload; `masked` (with zeros) is for clients."""
    if nbytes <= MAX_CONTROL_BYTES:
        size, extended = nbytes, b""
    elif nbytes < 1 << 16:
        size, extended = 126, nbytes.to_bytes(2, "big")
    else:
        size, extended = 127, nbytes.to_bytes(8, "big")
    if masked:
        return bytes((_FINAL | opcode, _MASKED | size)) + extended + _NO_MASK
    return bytes((_FINAL | opcode, size)) + extended


def control(opcode: int, payload: bytes, masked: bool) -> bytes:
    """A whole PING, PONG or CLOSE, or another message as short."""
    return head(opcode, len(payload), masked) + payload


def goodbye(code: int, reason: str) -> bytes:
    """The payload of a CLOSE; the reason is cut to what it holds, between characters."""
    text = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
    return code.to_bytes(2, "big") + text.encode()


def read_goodbye(payload: bytes | bytearray) -> tuple[int, str]:
    """Code (0: none was said) and reason of a CLOSE."""
    return int.from_bytes(payload[:2], "big"), bytes(payload[2:]).decode(errors="replace")


class MessageReader:
    """The messages in a connection's bytes, whatever pieces these come in.

    FrameError where the other side breaks the rules: a message of more than `max_bytes`, for one, before memory is
    taken for it. Payloads are memory of their own and are not touched again.
    """

    def __init__(self, max_bytes: int, masked: bool) -> None:
        self._max_bytes, self._masked = max_bytes, masked
        self._record = memoryview(bytearray(RECORD_BYTES))
        self._bytes = b""
        self._at = 0  # of these, what lies before is done with
        self._body: bytearray | None = None  # of a message that came in part
        self._have = 0  # bytes of it
        self._in_place = False  # whether `room` is where they belong
        self._opcode = 0

    @property
    def room(self) -> memoryview:
        """Where the next bytes are to be read to: while a record or more of a message is missing, to their place."""
        body = self._body
        self._in_place = body is not None and len(body) - self._have >= RECORD_BYTES
        return self._record if body is None or not self._in_place else memoryview(body)[self._have :]

    @property
    def missing(self) -> bool:
        """Whether a message has come in part."""
        return self._body is not None

    def filled(self, nbytes: int) -> None:
        """So many bytes lie in `room` now; `next` is to be called until it is None before the next ones."""
        if self._in_place:
            self._have += nbytes
            return
        self._bytes = self._bytes[self._at :] + self._record[:nbytes]
        self._at = 0

    def next(self) -> Message | None:
        """The next message that is complete."""
        if self._body is None:
            start = self._head()
            if start is None:
                return None
            at, size = start
            end = at + size
            if end <= len(self._bytes):
                self._at = end
                return self._opcode, self._bytes[at:end]
            self._at = at
            self._body, self._have = bytearray(size), 0
        body = self._body
        more = self._bytes[self._at : self._at + len(body) - self._have]
        body[self._have : self._have + len(more)] = more
        self._have += len(more)
        self._at += len(more)
        if self._have < len(body):
            return None
        self._body = None
        return self._opcode, body

    def _head(self) -> tuple[int, int] | None:
        """Where the next message's payload begins and how long it is; None while its head is not complete."""
        data, at = self._bytes, self._at
        if len(data) < at + 2:
            return None
        first, size = data[at], data[at + 1] & 0x7F
        opcode = first & 0x0F
        if first & _RESERVED:
            raise FrameError("a websocket message with bits that nobody agreed on")
        if opcode in (CLOSE, PING, PONG):
            if not first & _FINAL or size > MAX_CONTROL_BYTES:
                raise FrameError("a websocket control message is whole and at most 125 bytes")
        elif opcode != BINARY or not first & _FINAL:
            raise FrameError("a link carries binary frames only, each in one message")
        if bool(data[at + 1] & _MASKED) != self._masked:
            raise FrameError("only what a client sends is masked")
        start = at + 2
        if size > MAX_CONTROL_BYTES:
            width = 2 if size == 126 else 8
            if len(data) < start + width:
                return None
            size = int.from_bytes(data[start : start + width], "big")
            start += width
            if size <= MAX_CONTROL_BYTES or (width == 8 and size < 1 << 16):
                raise FrameError("a websocket message's length takes no more bytes than it needs")
        if size > self._max_bytes:
            raise FrameError(f"a message of {size} bytes exceeds limit {self._max_bytes}")
        if self._masked:
            if len(data) < start + 4:
                return None
            if data[start : start + 4] != _NO_MASK:
                raise FrameError("a mask that is not of zeros")
            start += 4
        self._opcode = opcode
        return start, size
