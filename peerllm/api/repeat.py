"""Headers of a request that may be sent again, and of a stream that goes on where it broke off."""

from __future__ import annotations

import hashlib
import secrets
import sys
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from peerllm.api.error_answers import FieldError
from peerllm.errors import UnavailableError

KEY_HEADER = "Idempotency-Key"
LAST_HEADER = "Last-Event-ID"
FLEETING_HEADER = "X-PeerLLM-Fleeting"  # between devices: the key is not the client's, whose hanging up ends the answer
MAX_KEY_CHARS = 255
END = "end"  # the id of an answer's last event; the others are numbered by the tokens that they complete
_MAX_DIGITS = 10
_FORM = ("stream", "stream_options", "return_token_ids")  # fields that change how an answer is told, not the answer


class DeviceLeavingError(UnavailableError):
    """The device that answers shuts down, or another goes on with the model: so may an answer that has a key."""

    code = "device_leaving"


@dataclass(slots=True)
class Repeat:
    """`last` is the id of the last event that the client has, None if it has none.

    `fleeting`: the device that the client asked made the key, so that the answer may move; the client knows of none.
    """

    key: str
    fingerprint: bytes  # of the body
    last: str | None = None
    fleeting: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens the client has the text of."""
        if self.last is None:
            return 0
        return sys.maxsize if self.last == END else int(self.last)


def fleeting(body: Any) -> Repeat:
    """For an answer that the client gave no key."""
    return Repeat(secrets.token_hex(16), _fingerprint(body), fleeting=True)


def repeat_of(request: web.Request, body: Any) -> Repeat | None:
    """What the headers say, None without a key; FieldError if they cannot be used."""
    key, last = request.headers.get(KEY_HEADER), request.headers.get(LAST_HEADER)
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise FieldError(f"{KEY_HEADER} must have 1 to {MAX_KEY_CHARS} printable ASCII characters", KEY_HEADER)
    if last is not None and last != END and not (last.isascii() and last.isdigit() and len(last) <= _MAX_DIGITS):
        raise FieldError(f"{LAST_HEADER} must be an id that this answer's events had", LAST_HEADER)
    return Repeat(key, _fingerprint(body), last)


def _fingerprint(body: Any) -> bytes:
    asked = {name: value for name, value in body.items() if name not in _FORM}
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).digest()
