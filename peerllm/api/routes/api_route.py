"""The one declaration of a route: it registers the handler, reads what that takes, and is what the document says."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_type_hints

from aiohttp import web
from msgspec import Struct

from peerllm.api.bodies import read_body, read_query
from peerllm.api.core.telling import taking
from peerllm.api.error_answers import json_response

JSON = "application/json"


class NoFields(Struct):
    """The body of what needs none."""


@dataclass(frozen=True)
class ApiRoute:
    """`async def handler(request, body: Struct, *, query: Struct) -> Answer`, where body and query may be left out.

    The handler's docstring is the route's summary. What it returns goes out as JSON, None as an empty answer. One that
    makes its response by itself names in `answers` what that has, by content type: a TypedDict, or for streams that of
    each event or line (several: a tuple). `refuses`: the statuses of its errors beside those that every route has
    (api_document.py). `asks`: a model answers, so it is bounded as telling.taking says, and has the errors of that.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    answers: Mapping[str, Any] = field(default_factory=dict)
    refuses: tuple[int, ...] = ()
    asks: bool = False
    heads: bool = True  # where it is GET: HEAD is answered, too

    @cached_property
    def takes(self) -> tuple[type[Any] | None, type[Any] | None]:
        """The types of body and query."""
        hints, (_, *more) = get_type_hints(self.handler), inspect.signature(self.handler).parameters
        return next((hints[name] for name in more if name != "query"), None), hints.get("query")

    @cached_property
    def gives(self) -> Mapping[str, Any]:
        """What its answers have, by content type; empty where there is none."""
        made = get_type_hints(self.handler)["return"]
        return self.answers or ({} if made is type(None) else {JSON: made})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The handler with what it takes, its answer as a response."""
        body, query = self.takes
        with taking(request) if self.asks else nullcontext():
            given = () if body is None else (await read_body(request, body),)
            named = {} if query is None else {"query": read_query(request, query)}
            made = await self.handler(request, *given, **named)
        if isinstance(made, web.StreamResponse):
            return made
        return web.Response() if made is None else json_response(made)


ROUTES: web.AppKey[list[ApiRoute]] = web.AppKey("routes", list)


def add_routes(app: web.Application, *routes: ApiRoute) -> None:
    """Register and describe them; `create_app` has made the list."""
    for route in routes:
        if route.method == "GET":
            app.router.add_get(route.path, route.handle, allow_head=route.heads)
        else:
            app.router.add_route(route.method, route.path, route.handle)
        app[ROUTES].append(route)
