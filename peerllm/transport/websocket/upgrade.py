"""From HTTP/1.1 to a websocket (RFC 6455 section 4), the little of it that a link needs. Sans-I/O and strict."""

from __future__ import annotations

import base64
import hashlib
import re
from http import HTTPStatus

from peerllm.errors import LinkError

MAX_HEAD_BYTES = 8192  # of a request or an answer
END = b"\r\n\r\n"  # of a head
_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t\x80-\xff]*)")
_REQUEST = re.compile(r"GET (/[\x21-\x7e]*) HTTP/1\.1")
_ANSWER = re.compile(r"HTTP/1\.1 ([1-5][0-9][0-9])(?: [\x20-\x7e]*)?")
_KEY = re.compile(r"[0-9A-Za-z+/]{22}==")  # 16 bytes in base64


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
    """Path and key of a client's whole head; DeclinedError if it does not ask for a websocket."""
    first, fields = _lines(head)
    found, key = _REQUEST.fullmatch(first), fields.get("sec-websocket-key", "")
    if found and _upgrades(fields) and fields.get("sec-websocket-version") == "13" and _KEY.fullmatch(key):
        return found[1], key
    raise DeclinedError(HTTPStatus.BAD_REQUEST)


def agreed(key: str) -> bytes:
    """The answer that begins a websocket."""
    return (
        f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {_accept(key)}\r\n\r\n"
    ).encode()


def declined(status: HTTPStatus) -> bytes:
    """The answer that ends the connection."""
    return f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def read_answer(head: bytes, key: str) -> int:
    """The status in a whole head; LinkError if this is no answer, or 101 to something else than was asked."""
    first, fields = _lines(head)
    if (found := _ANSWER.fullmatch(first)) is None:
        raise LinkError("it speaks no HTTP")
    status = int(found[1])
    extras = fields.keys() & {"sec-websocket-extensions", "sec-websocket-protocol"}
    if status == HTTPStatus.SWITCHING_PROTOCOLS and (
        not _upgrades(fields) or extras or fields.get("sec-websocket-accept") != _accept(key)
    ):
        raise LinkError("it agreed to something else than was asked for")
    return status


def _lines(head: bytes) -> tuple[str, dict[str, str]]:
    """First line and fields of a whole head; no line and no fields if one is malformed, or stands there twice."""
    first, *rest = head.removesuffix(END).decode("latin-1").split("\r\n")
    found = [_FIELD.fullmatch(line) for line in rest]
    fields = {field[1].lower(): field[2].strip() for field in found if field is not None}
    return (first, fields) if head.endswith(END) and len(fields) == len(rest) else ("", {})


def _upgrades(fields: dict[str, str]) -> bool:
    options = {option.strip().lower() for option in fields.get("connection", "").split(",")}
    return fields.get("upgrade", "").lower() == "websocket" and "upgrade" in options


def _accept(key: str) -> str:
    digest = hashlib.sha1((key + _MAGIC).encode(), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()
