"""From HTTP/1.1 to a websocket (RFC 6455 section 4), in the one spelling that engines use. Sans-I/O and strict."""

from __future__ import annotations

import base64
import hashlib
import re
from http import HTTPStatus

from peerllm.errors import LinkError

MAX_HEAD_BYTES = 1024  # of a request or an answer
END = b"\r\n\r\n"  # of a head
_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_REQUEST = re.compile(
    rb"GET (/[\x21-\x7e]*) HTTP/1\.1\r\nHost: [\x21-\x7e]+\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    rb"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ([0-9A-Za-z+/]{22}==)\r\n\r\n"
)
_STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9])[ \r]")


class DeclinedError(LinkError):
    """A request that is not followed, and the status that says so."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(f"declined with HTTP {status.value}")
        self.status = status


def request(host: str, port: int, path: str, key: str) -> bytes:
    """What a client sends; `key` is 16 random bytes in base64."""
    name = f"[{host.split('%', maxsplit=1)[0]}]" if ":" in host else host
    return (
        f"GET {path} HTTP/1.1\r\nHost: {name}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    ).encode()


def read_request(head: bytes) -> tuple[str, str]:
    """Path and key of a client's head; DeclinedError if `request` did not write it."""
    if (found := _REQUEST.fullmatch(head)) is None:
        raise DeclinedError(HTTPStatus.BAD_REQUEST)
    return found[1].decode(), found[2].decode()


def agreed(key: str) -> bytes:
    """The answer that begins a websocket."""
    digest = hashlib.sha1((key + _MAGIC).encode(), usedforsecurity=False).digest()
    return (
        f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}\r\n\r\n"
    ).encode()


def declined(status: HTTPStatus) -> bytes:
    """The answer that ends the connection."""
    return f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def read_answer(head: bytes, key: str) -> int:
    """The status in a server's head; LinkError if this is no answer, or 101 in other words than those of `agreed`."""
    if (found := _STATUS.match(head)) is None:
        raise LinkError("it speaks no HTTP")
    status = int(found[1])
    if status == HTTPStatus.SWITCHING_PROTOCOLS and head != agreed(key):
        raise LinkError("it agreed to something else than was asked for")
    return status
