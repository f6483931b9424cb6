"""Ollama's routes. HEAD and GET / are the page's."""

from __future__ import annotations

import time
from contextlib import aclosing

from aiohttp import web

import peerllm
from peerllm.api.bodies import read_body
from peerllm.api.core.answer_events import AnswerEnds
from peerllm.api.core.asking import answer
from peerllm.api.core.caller import caller_of
from peerllm.api.core.embeddings import vectors_of
from peerllm.api.core.generation import Generation
from peerllm.api.core.telling import taking, tell
from peerllm.api.error_answers import json_response
from peerllm.api.ollama.embed_requests import EmbedBody, OlderEmbedBody
from peerllm.api.ollama.ollama_answers import OllamaAnswers
from peerllm.api.ollama.ollama_models import ShowBody, running, shown, tags
from peerllm.api.ollama.ollama_requests import GenerateBody, OllamaChatBody
from peerllm.api.ollama.shelf_routes import add_shelf

OLLAMA_VERSION = "0.12.6"  # of Ollama's API: clients ask for a least one


def add_ollama(app: web.Application) -> None:
    app.router.add_get("/api/version", version)
    app.router.add_get("/api/tags", list_tags)
    app.router.add_get("/api/ps", list_running)
    app.router.add_post("/api/show", show)
    add_shelf(app)
    app.router.add_post("/api/chat", chat)
    app.router.add_post("/api/generate", generate)
    app.router.add_post("/api/embed", embed)
    app.router.add_post("/api/embeddings", older_embed)


async def version(_: web.Request) -> web.Response:
    return json_response({"version": OLLAMA_VERSION, "peerllm": peerllm.__version__})


async def list_tags(request: web.Request) -> web.Response:
    return json_response(tags(request.app))


async def list_running(request: web.Request) -> web.Response:
    return json_response(running(request.app))


async def show(request: web.Request) -> web.Response:
    return json_response(await shown(request.app, (await read_body(request, ShowBody)).asked()))


async def chat(request: web.Request) -> web.StreamResponse:
    with taking(request):
        return await _answered(request, await read_body(request, OllamaChatBody), chat=True)


async def generate(request: web.Request) -> web.StreamResponse:
    with taking(request):
        return await _answered(request, await read_body(request, GenerateBody), chat=False)


async def _answered(request: web.Request, body: OllamaChatBody | GenerateBody, chat: bool) -> web.StreamResponse:
    form, wanted = OllamaAnswers(body.model, chat), body.generation()
    if not wanted.load_only:
        return await tell(request, [wanted], form, body.streamed)
    return json_response(form.loaded(await _loaded(request, wanted)))


async def _loaded(request: web.Request, wanted: Generation) -> str:
    """Why a request ended that says nothing: "load" or "unload"."""
    reason = ""
    async with aclosing(answer(request.app, wanted, caller_of(request), None)) as events:
        async for event in events:
            reason = event.reason if isinstance(event, AnswerEnds) else reason
    return reason


async def embed(request: web.Request) -> web.Response:
    with taking(request):
        return await _embedded(request, await read_body(request, EmbedBody))


async def older_embed(request: web.Request) -> web.Response:
    with taking(request):
        return await _embedded(request, await read_body(request, OlderEmbedBody))


async def _embedded(request: web.Request, body: EmbedBody | OlderEmbedBody) -> web.Response:
    since, wanted = time.monotonic(), body.generations()
    if not wanted:
        await _loaded(request, body.loading())
        return json_response(body.answer(None, since))
    return json_response(body.answer(await vectors_of(request.app, wanted, caller_of(request)), since))
