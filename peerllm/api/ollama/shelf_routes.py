"""/api/pull, /api/copy and /api/delete: the models on this device's disk."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Annotated

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.core.generation import MAX_NAME_CHARS, Name
from peerllm.api.core.named_models import find_model
from peerllm.api.core.telling import taking
from peerllm.api.error_answers import failing_as, json_response
from peerllm.api.keys import HOUSEHOLD
from peerllm.api.ollama.ollama_answers import ollama_error
from peerllm.api.ollama.ollama_models import ShowBody
from peerllm.api.ollama.ollama_objects import PullLine
from peerllm.api.routes.api_route import JSON, ApiRoute, add_routes
from peerllm.api.streams import LINES, Stream

LOOK_S = 0.5  # seconds between two words to a client that waits for a model


class PullBody(ShowBody):
    stream: bool | None = None


class CopyBody(Struct):
    source: Name
    destination: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]


def add_shelf(app: web.Application) -> None:
    add_routes(
        app,
        ApiRoute("POST", "/api/pull", pull, {JSON: PullLine, LINES: PullLine}, refuses=(404, 409, 507)),
        ApiRoute("POST", "/api/copy", copy, refuses=(404,)),
        ApiRoute("DELETE", "/api/delete", delete, refuses=(404, 409)),
    )


async def pull(request: web.Request, body: PullBody) -> web.StreamResponse:
    """Fetch a model to this device.

    The last line of its progress says "success". Hanging up ends it; what came so far is kept for later.
    """
    with taking(request):
        name, so_far = body.asked(), (0, 0)

        def note(done: int, total: int) -> None:
            nonlocal so_far
            so_far = done, total

        stream = Stream(request, LINES, failing_as(ollama_error))
        work = asyncio.create_task(request.app[HOUSEHOLD].pull(name, note), name="pull")
        try:
            if body.stream is False:
                await work
                return json_response(PullLine(status="success"))
            while not (await asyncio.wait({work}, timeout=LOOK_S))[0]:
                await stream.send(_line(name, *so_far))
            work.result()  # raises why it is not here
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        if stream.started and so_far[1]:
            await stream.send(_line(name, so_far[1], so_far[1]))
        await stream.send(PullLine(status="success"))
        return await stream.end()


def _line(name: str, done: int, total: int) -> PullLine:
    if not total:
        return {"status": "pulling manifest"}
    digest = hashlib.sha256(name.encode()).hexdigest()  # clients tell the parts of a model apart by it
    return {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}", "total": total, "completed": done}


async def copy(request: web.Request, body: CopyBody) -> None:
    """Another name for a model; nothing is copied."""
    model = find_model(request.app, body.source)
    await request.app[HOUSEHOLD].alias(body.destination, model.model)


async def delete(request: web.Request, body: ShowBody) -> None:
    """Take away another name, or delete a model that was pulled."""
    await request.app[HOUSEHOLD].delete(body.asked())
