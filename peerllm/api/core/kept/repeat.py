"""Headers of a request that may be sent again, and of a stream that goes on where it broke off."""

from __future__ import annotations

import hashlib
import re
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
END = "end"  # the id of an answer's last event; the others are numbered (`Repeat.place`)
ALL_TOKENS = 2**53  # more than any answer has
KEY = re.compile(rf"^[!-~]([ -~]{{0,{MAX_KEY_CHARS - 2}}}[!-~])?$")
EVENT_ID = re.compile(rf"^(?:([0-9]{{1,10}})(?:\.([0-9]{{1,4}}))?|{END})$")


class DeviceLeavingError(UnavailableError):
    """The device that answers shuts down, or another goes on with the model: so may an answer that has a key."""

    code = "device_leaving"


@dataclass(slots=True)
class Repeat:
    """`had`: of how many tokens the client has all; None: it does not even know that the answer began.

    `beyond`: and how many events of the next token, which may have several.
    `fleeting`: the device that the client asked made the key, so that the answer may move; the client knows of none,
    and its hanging up ends the answer.
    """

    key: str
    fingerprint: bytes  # of the generation
    had: int | None = None
    fleeting: bool = False
    beyond: int = 0

    def note(self, event: AnswerEvent) -> None:
        """The client is told this now."""
        if isinstance(event, AnswerBegins):
            self.had = self.had or 0
        elif isinstance(event, TextDelta | ToolCallBegins | ToolCallDelta):
            self.beyond = self.beyond + 1 if event.tokens == self.had else 0
            self.had = event.tokens

    @property
    def place(self) -> str:
        """The id of the event that was noted last."""
        return f"{self.had or 0}.{self.beyond}" if self.beyond else str(self.had or 0)


def fleeting(wanted: Generation) -> Repeat:
    """For an answer that the client gave no key."""
    return Repeat(secrets.token_hex(16), fingerprint(wanted), fleeting=True)


def repeat_of(request: web.Request, wanted: Generation) -> Repeat | None:
    """What the headers say, None without a key; FieldError if they cannot be used."""
    key, last = request.headers.get(KEY_HEADER), request.headers.get(LAST_HEADER)
    if key is not None and not KEY.fullmatch(key):
        raise FieldError(f"{KEY_HEADER} must have 1 to {MAX_KEY_CHARS} printable ASCII characters", KEY_HEADER)
    place = None if last is None else EVENT_ID.fullmatch(last)
    if last is not None and place is None:
        raise FieldError(f"{LAST_HEADER} must be an id that this answer's events had", LAST_HEADER)
    if key is None:
        return None
    if place is None:
        return Repeat(key, fingerprint(wanted))
    return Repeat(key, fingerprint(wanted), int(place[1] or ALL_TOKENS), beyond=int(place[2] or 0))


def fingerprint(wanted: Generation) -> bytes:
    """Equal for equal generations, on every device."""
    return hashlib.sha256(msgspec.json.encode(wanted, order="deterministic")).digest()
