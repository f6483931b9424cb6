"""The page and its files: read once at start, served by exact name, nothing else on the disk is reachable."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from aiohttp import web
from msgspec import Struct

from peerllm.api.guard import COOKIE_AGE_S
from peerllm.api.keys import GUARD
from peerllm.api.routes.api_route import ApiRoute, add_routes
from peerllm.web import STATIC_DIR

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class File:
    body: bytes
    content_type: str
    etag: str


def load_files() -> dict[str, File]:
    """Every file of the page by its name."""
    files = {}
    for path in sorted(STATIC_DIR.iterdir()):
        kind = CONTENT_TYPES.get(path.suffix)
        if kind is not None:
            body = path.read_bytes()
            files[path.name] = File(body, kind, hashlib.sha256(body).hexdigest()[:32])
    return files


FILES: web.AppKey[dict[str, File]] = web.AppKey("files", dict)


class PageQuery(Struct):
    """`token`: the device's or a person's, which signs a browser in."""

    token: str = ""


def add_page(app: web.Application) -> None:
    app[FILES] = load_files()
    add_routes(
        app,
        ApiRoute("GET", "/", page, {CONTENT_TYPES[".html"]: str}),
        ApiRoute("GET", "/static/{name}", static, dict.fromkeys(CONTENT_TYPES.values(), str), refuses=(404,)),
    )


async def page(request: web.Request, *, query: PageQuery) -> web.StreamResponse:
    """The page; with a token it also signs the browser in.

    The page takes the token out of the address bar.
    """
    response = _answer(request, "index.html")
    guard = request.app[GUARD]
    if guard.opens(query.token):
        response.set_cookie(
            guard.cookie, query.token, max_age=COOKIE_AGE_S, httponly=True, samesite="Strict", path="/",
            secure=request.secure,
        )  # fmt: skip
    return response


async def static(request: web.Request) -> web.StreamResponse:
    """One of the page's files."""
    return _answer(request, request.match_info["name"])


def _answer(request: web.Request, name: str) -> web.Response:
    file = request.app[FILES].get(name)
    if file is None:
        raise web.HTTPNotFound
    headers = {"Cache-Control": "no-cache", "ETag": f'"{file.etag}"', "Content-Type": file.content_type}
    if any(tag.value == file.etag for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=file.body, headers=headers)
