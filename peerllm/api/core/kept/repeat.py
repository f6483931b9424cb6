"""Headers of a request that may be sent again, and of a stream that goes on where it broke off."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import msgspec
from aiohttp import web

from peerllm.api.core.answer_events import AnswerBegins, AnswerEvent, TextDelta, ToolCallBegins, ToolCallDelta
from peerllm.api.core.generation import Generation
from peerllm.api.error_answers import FieldError
from peerllm.errors import UnavailableError

KEY_HEADER = "Idempotency-Key"
LAST_HEADER = "Last-Event-ID"
MAX_KEY_CHARS = 255
END = "end"  # the id of an answer's last event; the others are numbered by the tokens that they complete
ALL_TOKENS = 2**53  # more than any answer has
_MAX_DIGITS = 10


class DeviceLeavingError(UnavailableError):
    """The device that answers shuts down, or another goes on with the model: so may an answer that has a key."""

    code = "device_leaving"


@dataclass(slots=True)
class Repeat:
    """`had`: of how many tokens the client has the text; None: it does not even know that the answer began.

    `fleeting`: the device that the client asked made the key, so that the answer may move; the client knows of none,
    and its hanging up ends the answer.
    """

    key: str
    fingerprint: bytes  # of the generation
    had: int | None = None
    fleeting: bool = False

    def note(self, event: AnswerEvent) -> None:
        """The client is told this now."""
        if isinstance(event, AnswerBegins):
            self.had = self.had or 0
        elif isinstance(event, TextDelta | ToolCallBegins | ToolCallDelta):
            self.had = event.tokens


def fleeting(wanted: Generation) -> Repeat:
    """For an answer that the client gave no key."""
    return Repeat(secrets.token_hex(16), fingerprint(wanted), fleeting=True)


def repeat_of(request: web.Request, wanted: Generation) -> Repeat | None:
    """What the headers say, None without a key; FieldError if they cannot be used."""
    key, last = request.headers.get(KEY_HEADER), request.headers.get(LAST_HEADER)
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
        raise FieldError(f"{KEY_HEADER} must have 1 to {MAX_KEY_CHARS} printable ASCII characters", KEY_HEADER)
    if last is not None and last != END and not (last.isascii() and last.isdigit() and len(last) <= _MAX_DIGITS):
        raise FieldError(f"{LAST_HEADER} must be an id that this answer's events had", LAST_HEADER)
    had = None if last is None else ALL_TOKENS if last == END else int(last)
    return Repeat(key, fingerprint(wanted), had)


def fingerprint(wanted: Generation) -> bytes:
    """Equal for equal generations, on every device."""
    return hashlib.sha256(msgspec.json.encode(wanted, order="deterministic")).digest()
