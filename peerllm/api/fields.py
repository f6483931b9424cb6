"""Reading a JSON body: bounded before it is parsed, every field checked, the offender named."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from peerllm.api.error_answers import FieldError
from peerllm.errors import BadInputError

MAX_BODY_BYTES = 8 << 20  # the text of some million tokens
MAX_CONTAINERS = 1 << 18  # objects and lists in a body: each takes 60 bytes and more where its text has three
BODY_TIMEOUT_S = 30.0  # seconds from the headers to the body's last byte


class TooLargeError(BadInputError):
    """The body is larger than MAX_BODY_BYTES."""

    http_status = 413


class SlowBodyError(BadInputError):
    """The body did not arrive within BODY_TIMEOUT_S."""

    http_status = 408


class EncodingError(BadInputError):
    """A compressed body: its true size would be known too late."""

    http_status = 415


def most_bytes(request: web.Request) -> int:
    """How large the body of a request may be, as far as its headers tell."""
    length = request.content_length
    return MAX_BODY_BYTES if length is None else min(length, MAX_BODY_BYTES)


async def read_object(request: web.Request) -> Fields:
    """The body as a JSON object; an empty body is an empty object."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise EncodingError("compressed bodies are not taken; send plain JSON")
    too_large = f"the body is larger than the limit of {MAX_BODY_BYTES} bytes"
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise TooLargeError(too_large)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLargeError(too_large) from error
    except TimeoutError as error:
        raise SlowBodyError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from error
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS:
        raise TooLargeError(f"the body has more than {MAX_CONTAINERS} brackets and braces")
    try:
        body = orjson.loads(raw) if raw.strip() else {}
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadInputError("the body must be a JSON object")
    return Fields(body)


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object's fields, read with their types; null counts as absent, `where` prefixes the names in errors."""

    body: Mapping[str, Any]
    where: str = ""

    def raw(self, name: str) -> Any:
        """The value as it came, None if absent."""
        return self.body.get(name)

    def wrong(self, name: str, what: str) -> FieldError:
        """The error for a field that is not `what`."""
        return FieldError(f"{self.where}{name} must be {what}", self.where + name)

    def text(self, name: str, limit: int, default: str | None = None) -> str:
        """A string of 1 to `limit` characters."""
        value = self.body.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not 1 <= len(value) <= limit:
            raise self.wrong(name, f"a string of 1 to {limit} characters")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number in [low, high], or None."""
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number in [low, high], or None."""
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        """true or false; absent is false."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def choice(self, name: str, options: tuple[str, ...]) -> str:
        """One of `options`; absent is the first."""
        value = self.body.get(name, None)
        if value is None:
            return options[0]
        if value not in options:
            raise self.wrong(name, "one of " + ", ".join(filter(None, options)))
        return str(value)

    def inner(self, name: str) -> Fields:
        """An object within this one; absent is empty."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value or {}, f"{self.where}{name}.")
