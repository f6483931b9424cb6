"""GET /openapi.json: what the OpenAPI 3.1 document says of every route, made from the routes themselves."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Literal, get_origin, get_type_hints

import msgspec
from aiohttp import web

import peerllm
from peerllm.api.core.generation import MAX_NAME_CHARS
from peerllm.api.core.kept.repeat import EVENT_ID, KEY, KEY_HEADER, LAST_HEADER
from peerllm.api.error_answers import shape_at
from peerllm.api.guard import ADMIN_PREFIX, API_KEY_HEADER, PAGE_HEADER
from peerllm.api.keys import GUARD
from peerllm.api.routes.api_route import JSON, ROUTES, ApiRoute
from peerllm.api.streams import LINES, SSE

_EVERY = (401, 403, 429, 503)  # the guard's, and a device's that is busy or still starting
_BODY = (400, 408, 413, 415)
_ASKED = (400, 404, 409, 422, 507)  # of a request that a model answers
_REF = "#/components/schemas/{name}"
_PLACES = re.compile(r"\{(\w+)\}")
_SECURITY: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The device's token"},
    "key": {"type": "apiKey", "in": "header", "name": API_KEY_HEADER, "description": "The device's token"},
}
_ABOUT = f"""What one device of a household answers. Changes of the household (POST below {ADMIN_PREFIX}) need the
device's token, or the header `{PAGE_HEADER}` that its own page sends; the other routes need the token where the device
listens beyond loopback. Fields that nobody knows are skipped. Pages of other origins are refused (403), and no
preflight is granted."""
_KEPT = (
    {"name": KEY_HEADER, "in": "header", "schema": {"type": "string", "pattern": KEY.pattern}},
    {"name": LAST_HEADER, "in": "header", "schema": {"type": "string", "pattern": EVENT_ID.pattern}},
)


def openapi(app: web.Application) -> dict[str, Any]:
    """The document; it depends on nothing but the code and on whether the device listens on loopback only."""
    routes = app[ROUTES]
    schemas = _Schemas(app, routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = paths.setdefault(re.sub(r"\{(\w+):[^}]*\}", r"{\1}", route.path), {})
        path[route.method.lower()] = _operation(app, route, schemas)
        if route.method == "GET" and route.heads:
            path["head"] = _head(path["get"])
    return {
        "openapi": "3.1.0",
        "info": {"title": "peerllm", "version": peerllm.__version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": _SECURITY},
    }


class _Schemas:
    """The schemas of all types that routes name."""

    def __init__(self, app: web.Application, routes: Iterable[ApiRoute]) -> None:
        kinds = list(dict.fromkeys(kind for route in routes for kind in self._kinds(app, route)))
        found, self.components = msgspec.json.schema_components(kinds, ref_template=_REF)
        self._found = dict(zip(kinds, found, strict=True))

    def _kinds(self, app: web.Application, route: ApiRoute) -> Iterator[Any]:
        yield from (one for one in route.takes if one is not None)
        yield error_kind(app, route)
        for kind in route.gives.values():
            yield from kind if isinstance(kind, tuple) else (kind,)

    def of(self, kind: Any) -> dict[str, Any]:
        """One type's, or any of several."""
        found = [self._found[one] for one in kind] if isinstance(kind, tuple) else [self._found[kind]]
        return {"anyOf": found} if len(found) > 1 else found[0]

    def query(self, kind: type[Any] | None) -> list[dict[str, Any]]:
        """The parameters in a query."""
        if kind is None:
            return []
        found = self.components[kind.__name__]
        needed = found.get("required", ())
        return [
            {"name": name, "in": "query", "required": name in needed, "schema": schema}
            for name, schema in found["properties"].items()
        ]


def error_kind(app: web.Application, route: ApiRoute) -> Any:
    """The type of a route's errors."""
    return get_type_hints(shape_at(app, route.path))["return"]


def _operation(app: web.Application, route: ApiRoute, schemas: _Schemas) -> dict[str, Any]:
    summary, _, description = inspect.cleandoc(route.handler.__doc__ or "").partition("\n\n")
    body, query = route.takes
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS},
        }
        for name in _PLACES.findall(re.sub(r":[^}]*\}", "}", route.path))
    ]
    parameters += schemas.query(query)
    if route.asks and len(route.gives) > 1:
        parameters += _KEPT
    changes = route.method != "GET" and route.path.startswith(ADMIN_PREFIX)
    found: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": summary.replace("\n", " "),
        "description": description,
        "parameters": parameters,
        "responses": {"200": _answer(route, schemas, error_kind(app, route)), **_refusals(app, route, schemas)},
        "security": [] if app[GUARD].loopback and not changes else [{name: list[str]()} for name in _SECURITY],
    }
    if body is not None:
        schema = schemas.of(body)
        needed = bool(schemas.components[body.__name__].get("required"))  # what needs none may come without
        found["requestBody"] = {"required": needed, "content": {JSON: {"schema": schema}}}
    return {name: value for name, value in found.items() if value or name == "security"}


def _answer(route: ApiRoute, schemas: _Schemas, error: Any) -> dict[str, Any]:
    content = {}
    for kind, made in route.gives.items():
        told = (*made, error) if isinstance(made, tuple) else (made, error)
        if kind == SSE:
            content[_bare(SSE)] = {"schema": _event(told, schemas)}
        elif kind == LINES:
            content[LINES] = {"schema": {"type": "array", "description": "a line each", "items": schemas.of(told)}}
        else:
            content[_bare(kind)] = {"schema": schemas.of(made)}
    return {"description": "The answer", **({"content": content} if content else {})}


def _bare(kind: str) -> str:
    return kind.partition(";")[0]


def _event(told: tuple[Any, ...], schemas: _Schemas) -> dict[str, Any]:
    """Of each event of a stream; a Literal is data as it stands."""
    words = tuple(one for one in told if get_origin(one) is Literal)
    objects = schemas.of(tuple(one for one in told if one not in words))
    data: dict[str, Any] = {"type": "string", "contentMediaType": JSON, "contentSchema": objects}
    if words:
        data = {"anyOf": [data, schemas.of(words)]}
    properties = {"data": data, "event": {"type": "string"}, "id": {"type": "string"}}
    return {"type": "object", "description": "each event", "properties": properties, "required": ["data"]}


def _refusals(app: web.Application, route: ApiRoute, schemas: _Schemas) -> Mapping[str, Any]:
    body, query = route.takes
    asked = _ASKED if route.asks else ()
    statuses = {*_EVERY, *route.refuses, *asked, *(_BODY if body is not None else ()), *((400,) if query else ())}
    content = {JSON: {"schema": schemas.of(error_kind(app, route))}}
    return {str(one): {"description": HTTPStatus(one).phrase, "content": content} for one in sorted(statuses)}


def _head(get: Mapping[str, Any]) -> dict[str, Any]:
    """The same without a body."""
    answers = {status: {"description": one["description"]} for status, one in get["responses"].items()}
    return {**get, "operationId": f"head_{get['operationId']}", "responses": answers}


async def openapi_document(request: web.Request) -> dict[str, Any]:
    """This document."""
    return await asyncio.to_thread(openapi, request.app)  # takes a tenth of a second
