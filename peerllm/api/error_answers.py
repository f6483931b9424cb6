"""Every refusal as one JSON object, in the shape that the clients of its route read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from peerllm.api.streams import STREAM, Failing, Stream
from peerllm.errors import BadInputError, OverloadedError, PeerLLMError, one_line

RETRY_AFTER_S = 5  # seconds after which a client may ask again for what is not available now
MAX_MESSAGE_CHARS = 2000  # of an error's line
log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_HTTP_LINES = {
    404: "no such route",
    405: "this route does not take that method",
    413: "the body is too large",
}


class FieldError(BadInputError):
    """A field of the request's body cannot be used; `param` names it."""

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModelError(FieldError):
    """The household has no deployment of that name."""

    http_status = 404


class ErrorMore(TypedDict, total=False):
    """How far a model is, and what memory it lacks."""

    loading: dict[str, Any]
    missing_bytes: int


_MORE = tuple(ErrorMore.__annotations__)


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """What is told of an error, whatever the API."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    more: ErrorMore = field(default_factory=ErrorMore)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> ErrorFacts:
        """What another device told (`household_error`)."""
        status, param, code = told.get("status"), told.get("param"), told.get("code")
        return cls(
            status if isinstance(status, int) and 400 <= status < 600 else 500,
            str(told.get("message", ""))[:MAX_MESSAGE_CHARS],
            param if isinstance(param, str) else None,
            code if isinstance(code, str) else None,
            _more(told),
        )


def _more(told: Mapping[str, Any]) -> ErrorMore:
    return cast("ErrorMore", {name: told[name] for name in _MORE if told.get(name)})


class RelayedError(PeerLLMError):
    """Another device's error, told as it told it."""

    def __init__(self, facts: ErrorFacts, retry_after: str = "") -> None:
        super().__init__(facts.message)
        self.facts = facts
        self.retry_after = retry_after


class ToldError(ErrorMore):
    """An error as OpenAI's clients and other devices read it."""

    message: str
    type: str
    param: str | None
    code: str | None
    status: int


class HouseholdError(TypedDict):
    error: ToldError


ErrorShape = Callable[[ErrorFacts], Any]


def household_error(facts: ErrorFacts) -> HouseholdError:
    """{"error": {...}}: what OpenAI's clients read, and other devices."""
    kind = _TYPES.get(facts.status, "invalid_request_error" if facts.status < 500 else "server_error")
    told: ToldError = {
        "message": facts.message,
        "type": kind,
        "param": facts.param,
        "code": facts.code,
        "status": facts.status,
        **facts.more,
    }
    return {"error": told}


# By the beginning of the path, or by a header that is there; the longest that fits. All others: `household_error`.
SHAPES: web.AppKey[Mapping[str, ErrorShape]] = web.AppKey("shapes", dict)


def shape_at(app: web.Application, path: str) -> ErrorShape:
    """How the clients of a route read errors."""
    shapes = app.get(SHAPES, {})
    found = [prefix for prefix in shapes if path.startswith(prefix)]
    return shapes[max(found, key=len)] if found else household_error


def shape_of(request: web.Request) -> ErrorShape:
    """How the client of this request reads errors."""
    shapes = request.app.get(SHAPES, {})
    named = next((one for one in shapes if one in request.headers), None)
    return shapes[named] if named is not None else shape_at(request.app, request.path)


def failing_as(shape: ErrorShape) -> Failing:
    """A stream ends with one object of this shape."""
    return lambda facts: (shape(facts),)


def facts_of(error: PeerLLMError) -> ErrorFacts:
    """Of one of our own errors."""
    if isinstance(error, RelayedError):
        return error.facts
    return ErrorFacts(
        error.http_status,
        one_line(error, MAX_MESSAGE_CHARS),
        getattr(error, "param", None),
        getattr(error, "code", None),
        _more({name: getattr(error, name, None) for name in _MORE}),
    )


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`body` as JSON."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json", headers=headers)


def refused(request: web.Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """A refusal that needs no more words."""
    return json_response(shape_of(request)(ErrorFacts(status, message)), status, headers)


def error_response(request: web.Request, error: PeerLLMError) -> web.Response:
    """An error as the answer to a request whose body has not begun."""
    facts = facts_of(error)
    headers = {}
    if isinstance(error, RelayedError) and error.retry_after:
        headers["Retry-After"] = error.retry_after
    elif isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif facts.status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    elif facts.status == web.HTTPInternalServerError.status_code:
        headers["x-should-retry"] = "false"
    return json_response(shape_of(request)(facts), facts.status, headers)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No answer is HTML or a traceback; what we did not foresee is logged without the request's content."""
    try:
        return await handler(request)
    except PeerLLMError as error:
        return await _broken_off(request, facts_of(error)) or error_response(request, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kept = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return refused(request, error.status, _HTTP_LINES.get(error.status, error.reason.lower()), kept)
    except ConnectionError:
        stream: Stream | None = request.get(STREAM)
        if stream is None or not stream.started:
            raise
        return stream.response  # the client is gone; there is nobody to tell
    except Exception as error:
        log.exception("%s %s failed: %s", request.method, request.path, type(error).__name__)
        facts = ErrorFacts(500, "an internal error; the device's log has the details")
        return await _broken_off(request, facts) or error_response(request, RelayedError(facts))
    finally:
        # The two know each other: left so, every streamed answer would wait for a full collection of garbage.
        request.pop(STREAM, None)


async def _broken_off(request: web.Request, facts: ErrorFacts) -> web.StreamResponse | None:
    """An answer that has begun ends with the error in its own framing; None if none has."""
    stream: Stream | None = request.get(STREAM)
    if stream is None or not stream.started:
        return None
    await stream.fail(facts)
    return stream.response
