"""Every refusal as one JSON object, in the shape that OpenAI's clients read."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from peerllm.api.streams import STREAM, Stream
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


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """{"error": {...}} as OpenAI's clients expect it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: PeerLLMError) -> dict[str, Any]:
    """The error object of one of our own errors."""
    found = error_object(
        error.http_status,
        one_line(error, MAX_MESSAGE_CHARS),
        getattr(error, "param", None),
        getattr(error, "code", None),
    )
    found["error"]["status"] = error.http_status
    for name in ("loading", "missing_bytes"):  # how far a model is, and what memory it lacks
        if value := getattr(error, name, None):
            found["error"][name] = value
    return found


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """`body` as JSON."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json", headers=headers)


def error_response(error: PeerLLMError) -> web.Response:
    """An error as the answer to a request whose body has not begun."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.http_status == web.HTTPServiceUnavailable.status_code:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return json_response(describe(error), error.http_status, headers)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No answer is HTML or a traceback; what we did not foresee is logged without the request's content."""
    try:
        return await handler(request)
    except PeerLLMError as error:
        return await _broken_off(request, describe(error)) or error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        kept = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        message = _HTTP_LINES.get(error.status, error.reason.lower())
        return json_response(error_object(error.status, message), error.status, kept)
    except ConnectionError:
        stream: Stream | None = request.get(STREAM)
        if stream is None or not stream.started:
            raise
        return stream.response  # the client is gone; there is nobody to tell
    except Exception as error:
        log.exception("%s %s failed: %s", request.method, request.path, type(error).__name__)
        body = error_object(500, "an internal error; the device's log has the details")
        return await _broken_off(request, body) or json_response(body, 500, {"x-should-retry": "false"})
    finally:
        # The two know each other: left so, every streamed answer would wait for a full collection of garbage.
        request.pop(STREAM, None)


async def _broken_off(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
    """An answer that has begun ends with the error in its own framing; None if none has."""
    stream: Stream | None = request.get(STREAM)
    if stream is None or not stream.started:
        return None
    with contextlib.suppress(ConnectionError):
        await stream.send(body)
        await stream.end()
    return stream.response
