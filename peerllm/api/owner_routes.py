"""/peerllm/v1/limits: what the owner of this device allows; `pause` and `resume` set one of them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, Struct, UnsetType

from peerllm.api.guard import ADMIN_PREFIX
from peerllm.api.keys import HOUSEHOLD
from peerllm.api.routes.api_route import ApiRoute, NoFields, add_routes
from peerllm.daemon.facade_objects import LimitsStatus


class LimitsBody(Struct, forbid_unknown_fields=True):
    """Limits to change, 0 or null for none (daemon/owner/limits_file.py has their bounds).

    `hours`: minutes of the day, from and to.
    """

    memory_bytes: int | UnsetType | None = UNSET
    threads: int | UnsetType | None = UNSET
    hours: Annotated[list[int], Meta(min_length=2, max_length=2)] | UnsetType | None = UNSET
    battery_percent: int | UnsetType | None = UNSET
    hot_celsius: float | UnsetType | None = UNSET
    paused: bool | UnsetType = UNSET


def add_owner(app: web.Application) -> None:
    prefix = ADMIN_PREFIX + "v1"
    add_routes(
        app,
        ApiRoute("GET", f"{prefix}/limits", limits),
        ApiRoute("POST", f"{prefix}/limits", set_limits),
        ApiRoute("POST", f"{prefix}/pause", pause),
        ApiRoute("POST", f"{prefix}/resume", resume),
    )


async def limits(request: web.Request) -> LimitsStatus:
    """All limits, and "leaving": why nothing is lent now."""
    return request.app[HOUSEHOLD].limits()


async def set_limits(request: web.Request, body: LimitsBody) -> LimitsStatus:
    """Change some limits, the others stay; gives all."""
    return await request.app[HOUSEHOLD].set_limits(msgspec.to_builtins(body))


async def pause(request: web.Request, _: NoFields) -> LimitsStatus:
    """Lend nothing until `resume`."""
    return await request.app[HOUSEHOLD].set_limits({"paused": True})


async def resume(request: web.Request, _: NoFields) -> LimitsStatus:
    """Lend again."""
    return await request.app[HOUSEHOLD].set_limits({"paused": False})
