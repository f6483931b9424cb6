"""Every request has an id, and leaves a line in the log: who asked for what, and how that ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from peerllm import request_ids
from peerllm.api.core.caller import caller_of

ANTHROPIC_HEADER = "request-id"  # which Anthropic's client reads
MAX_PATH_CHARS = 120  # of a line
_READING = ("GET", "HEAD")
_FAILED = 400
log = logging.getLogger(__name__)

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)


@web.middleware
async def with_request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Before all others that answer."""
    return await logged(request, handler, lambda: caller_of(request).logged)


async def logged(request: web.Request, handler: Handler, asker: Callable[[], str]) -> web.StreamResponse:
    """The handler's answer, with an id in all that it causes. What only reads and succeeds leaves no line."""
    request_id = request[REQUEST_ID] = request_ids.taken_or_made(request.headers.get(request_ids.HEADER))
    with request_ids.caused_by(request_id):
        since, ended = time.monotonic(), "an error"
        quiet = request.method in _READING
        try:
            response = await handler(request)
            ended, quiet = str(response.status), quiet and response.status < _FAILED
            return response
        except asyncio.CancelledError:
            ended = "its client left"
            raise
        except web.HTTPException as error:
            ended = str(error.status)
            raise
        finally:
            path = request.rel_url.raw_path[:MAX_PATH_CHARS]  # its query may have a token
            asked = request.method, path, asker(), ended, time.monotonic() - since
            log.log(logging.DEBUG if quiet else logging.INFO, "%s %s of %s: %s after %.2f s", *asked)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal `on_response_prepare`."""
    if (request_id := request.get(REQUEST_ID)) is not None:
        response.headers[request_ids.HEADER] = response.headers[ANTHROPIC_HEADER] = request_id
