"""Reading a JSON body: bounded before it is parsed, every field checked against its type, the offender named."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

import msgspec
from aiohttp import web
from msgspec import inspect

from peerllm.api.error_answers import FieldError
from peerllm.errors import BadInputError

MAX_BODY_BYTES = 8 << 20  # the text of some million tokens
MAX_CONTAINERS = 1 << 18  # objects and lists in a body: each takes 60 bytes and more where its text has three
BODY_TIMEOUT_S = 30.0  # seconds from the headers to the body's last byte
T = TypeVar("T")
_PATH = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\w+|\[[^]]*\]")  # a field's name, or a place in a list
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")


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


async def read_body(request: web.Request, kind: type[T]) -> T:
    """The body as `kind`, a msgspec.Struct or a mapping; an empty body is an empty object."""
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
    return decoded(raw, kind)


def decoded(raw: bytes, kind: type[T]) -> T:
    """A body as `kind`; FieldError names what in it does not fit."""
    raw = raw if raw.strip() else b"{}"
    try:
        try:
            found: T = _decoder(cast("Hashable", kind)).decode(raw)
        except msgspec.ValidationError:
            found = msgspec.convert(_WHOLE.decode(raw), kind)
        return found
    except msgspec.ValidationError as error:
        raise _field_error(str(error), kind) from error
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise BadInputError(f"the body is not valid JSON: {error}") from error


def read_query(request: web.Request, kind: type[T]) -> T:
    """The query as `kind`, a msgspec.Struct; FieldError names what in it does not fit."""
    try:
        return msgspec.convert(dict(request.query), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _field_error(str(error), kind) from error


def _number(text: str) -> int | float:
    """JSON does not tell 4.0 from 4, and clients that know no whole numbers send it."""
    number = float(text)
    return int(number) if number.is_integer() else number


_WHOLE = msgspec.json.Decoder(float_hook=_number)


@cache
def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def _field_error(text: str, kind: type[Any]) -> BadInputError:
    """msgspec's words, with the field's name before them."""
    found = _PATH.fullmatch(text)
    assert found is not None
    what, path = found["what"], found["path"] or ""
    if missing := _MISSING.fullmatch(what):
        path, what = f"{path}.{missing['name']}".lstrip("."), "is missing"
        return FieldError(f"{path} {what}", path)
    what = what[:1].lower() + what[1:].replace("`", "")
    if what.startswith("invalid enum value"):
        what = "must be one of " + ", ".join(_choices(kind, path))
    return FieldError(f"{path}: {what}", path) if path else BadInputError(f"the body: {what}")


def _choices(kind: type[Any], path: str) -> list[str]:
    """What may stand at this place of a body."""
    found = _parts(inspect.type_info(kind))
    for step in _STEP.findall(path):
        inner: list[inspect.Type] = []
        for one in found:
            if isinstance(one, inspect.StructType):
                inner += [field.type for field in one.fields if field.encode_name == step]
            elif isinstance(one, (inspect.ListType, inspect.VarTupleType)):
                inner.append(one.item_type)
        found = [part for one in inner for part in _parts(one)]
    return [str(value) for one in found if isinstance(one, inspect.LiteralType) for value in one.values]


def _parts(one: inspect.Type) -> list[inspect.Type]:
    return list(one.types) if isinstance(one, inspect.UnionType) else [one]
