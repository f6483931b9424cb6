"""From HTTP/1.1 to a websocket (RFC 6455 section 4), the little of it that a link needs. Sans-I/O and strict."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from http import HTTPStatus

from peerllm.errors import LinkError

MAX_HEAD_BYTES = 8192  # of a request or an answer
END = b"\r\n\r\n"  # of a head
_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t\x80-\xff]*)")
_REQUEST = re.compile(r"([A-Z]{1,16}) (/[\x21-\x7e]*) HTTP/1\.1")
_ANSWER = re.compile(r"HTTP/1\.1 ([1-5][0-9][0-9])(?: [\x20-\x7e]*)?")


class DeclinedError(LinkError):
    """A request that is not followed, and the status that says so."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(f"declined with HTTP {status.value}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for; `key` is what it must hear again in the answer."""

    method: str
    path: str
    fields: dict[str, str]

    @property
    def key(self) -> str:
        """DeclinedError if this is no request for a websocket."""
        fields, key = self.fields, self.fields.get("sec-websocket-key", "")
        asked = _says(fields, "upgrade", "websocket") and _says(fields, "connection", "upgrade")
        if not asked or "transfer-encoding" in fields or fields.get("content-length", "0") != "0":
            raise DeclinedError(HTTPStatus.BAD_REQUEST)
        if fields.get("sec-websocket-version") != "13":
            raise DeclinedError(HTTPStatus.UPGRADE_REQUIRED)
        try:
            if len(base64.b64decode(key, validate=True)) == 16:
                return key
        except (binascii.Error, ValueError):
            pass
        raise DeclinedError(HTTPStatus.BAD_REQUEST)


def request(host: str, port: int, path: str, key: str) -> bytes:
    """What a client sends; `key` is 16 random bytes in base64."""
    name = f"[{host.split('%', maxsplit=1)[0]}]" if ":" in host else host
    return (
        f"GET {path} HTTP/1.1\r\nHost: {name}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    ).encode()


def read_request(head: bytes) -> Request:
    """The request in a whole head; DeclinedError if it is none."""
    try:
        first, fields = _lines(head)
    except ValueError as error:
        raise DeclinedError(HTTPStatus.BAD_REQUEST) from error
    if (found := _REQUEST.fullmatch(first)) is None:
        raise DeclinedError(HTTPStatus.BAD_REQUEST)
    return Request(found[1], found[2], fields)


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
    try:
        first, fields = _lines(head)
    except ValueError as error:
        raise LinkError("it speaks no HTTP") from error
    if (found := _ANSWER.fullmatch(first)) is None:
        raise LinkError("it speaks no HTTP")
    status = int(found[1])
    if status == HTTPStatus.SWITCHING_PROTOCOLS:
        sound = _says(fields, "upgrade", "websocket") and _says(fields, "connection", "upgrade")
        extras = fields.keys() & {"sec-websocket-extensions", "sec-websocket-protocol"}
        if not sound or extras or fields.get("sec-websocket-accept") != _accept(key):
            raise LinkError("it agreed to something else than was asked for")
    return status


def _lines(head: bytes) -> tuple[str, dict[str, str]]:
    """First line and fields; ValueError if they are malformed, or a field stands there twice."""
    if not head.endswith(END):
        raise ValueError("not a whole head")
    first, *rest = head[: -len(END)].decode("latin-1").split("\r\n")
    fields: dict[str, str] = {}
    for line in rest:
        found = _FIELD.fullmatch(line)
        if found is None or found[1].lower() in fields:
            raise ValueError("a malformed field")
        fields[found[1].lower()] = found[2].strip()
    return first, fields


def _says(fields: dict[str, str], name: str, word: str) -> bool:
    return word in (part.strip().lower() for part in fields.get(name, "").split(","))


def _accept(key: str) -> str:
    digest = hashlib.sha1((key + _MAGIC).encode(), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()
