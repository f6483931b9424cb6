"""/api/pull, /api/copy and /api/delete: the models on this device's disk."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.bodies import read_body
from peerllm.api.core.generation import MAX_NAME_CHARS, Name
from peerllm.api.core.named_models import find_model
from peerllm.api.core.telling import taking
from peerllm.api.error_answers import failing_as, json_response
from peerllm.api.keys import HOUSEHOLD
from peerllm.api.ollama.ollama_answers import ollama_error
from peerllm.api.ollama.ollama_models import ShowBody
from peerllm.api.streams import Stream

LOOK_S = 0.5  # seconds between two words to a client that waits for a model


class PullBody(ShowBody):
    stream: bool | None = None


class CopyBody(Struct):
    source: Name
    destination: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]


def add_shelf(app: web.Application) -> None:
    app.router.add_post("/api/pull", pull)
    app.router.add_post("/api/copy", copy)
    app.router.add_delete("/api/delete", delete)


async def pull(request: web.Request) -> web.StreamResponse:
    """Lines of progress, the last of which says "success". Hanging up ends it; what came so far is kept for later."""
    with taking(request):
        body = await read_body(request, PullBody)
        name, so_far = body.asked(), (0, 0)

        def note(done: int, total: int) -> None:
            nonlocal so_far
            so_far = done, total

        stream = Stream(request, "application/x-ndjson", failing_as(ollama_error))
        work = asyncio.create_task(request.app[HOUSEHOLD].pull(name, note), name="pull")
        try:
            if body.stream is False:
                await work
                return json_response({"status": "success"})
            while not (await asyncio.wait({work}, timeout=LOOK_S))[0]:
                await stream.send(_line(name, *so_far))
            work.result()  # raises why it is not here
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        if stream.started and so_far[1]:
            await stream.send(_line(name, so_far[1], so_far[1]))
        await stream.send({"status": "success"})
    return await stream.end()


def _line(name: str, done: int, total: int) -> dict[str, Any]:
    if not total:
        return {"status": "pulling manifest"}
    digest = hashlib.sha256(name.encode()).hexdigest()  # clients tell the parts of a model apart by it
    return {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}", "total": total, "completed": done}


async def copy(request: web.Request) -> web.Response:
    """Another name for a model; nothing is copied."""
    body = await read_body(request, CopyBody)
    model = find_model(request.app, body.source)
    await request.app[HOUSEHOLD].alias(body.destination, model.model)
    return web.Response()


async def delete(request: web.Request) -> web.Response:
    """Another name, or a model that was pulled."""
    await request.app[HOUSEHOLD].delete((await read_body(request, ShowBody)).asked())
    return web.Response()
