"""/peerllm/v1/limits: what the owner of this device allows; `pause` and `resume` set one of them."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from peerllm.api.bodies import read_body
from peerllm.api.error_answers import json_response
from peerllm.api.keys import HOUSEHOLD


async def limits(request: web.Request) -> web.Response:
    """All limits, and "leaving": why nothing is lent now."""
    return json_response(request.app[HOUSEHOLD].limits())


async def set_limits(request: web.Request) -> web.Response:
    """The limits to change, the others stay; gives all."""
    changes = await read_body(request, dict[str, Any])
    return json_response(await request.app[HOUSEHOLD].set_limits(changes))


async def pause(request: web.Request) -> web.Response:
    await read_body(request, dict[str, Any])
    return json_response(await request.app[HOUSEHOLD].set_limits({"paused": True}))


async def resume(request: web.Request) -> web.Response:
    await read_body(request, dict[str, Any])
    return json_response(await request.app[HOUSEHOLD].set_limits({"paused": False}))
