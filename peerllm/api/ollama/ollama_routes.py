"""Ollama's routes. HEAD and GET / are the page's."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from functools import partial

from aiohttp import web

import peerllm
from peerllm.api.core.answer_events import AnswerEnds
from peerllm.api.core.asking import answer
from peerllm.api.core.caller import caller_of
from peerllm.api.core.embeddings import Vectors, vectors_of
from peerllm.api.core.generation import Generation
from peerllm.api.core.kept.repeat import repeat_of
from peerllm.api.core.telling import tell
from peerllm.api.error_answers import json_response
from peerllm.api.ollama.embed_requests import EmbedBody, OlderEmbedBody
from peerllm.api.ollama.ollama_answers import OllamaAnswers
from peerllm.api.ollama.ollama_models import ShowBody, running, shown, tags
from peerllm.api.ollama.ollama_objects import (
    LoadedModels,
    OllamaChatAnswer,
    OllamaChatDelta,
    OllamaModels,
    OllamaTextAnswer,
    OllamaTextDelta,
    OllamaVector,
    OllamaVectors,
    OllamaVersion,
    ShownModel,
)
from peerllm.api.ollama.ollama_requests import GenerateBody, OllamaChatBody
from peerllm.api.ollama.shelf_routes import add_shelf
from peerllm.api.routes.api_route import JSON, ApiRoute, add_routes
from peerllm.api.streams import LINES

OLLAMA_VERSION = "0.12.6"  # of Ollama's API: clients ask for a least one


def add_ollama(app: web.Application) -> None:
    add_shelf(app)
    asked = partial(ApiRoute, "POST", asks=True)
    add_routes(
        app,
        ApiRoute("GET", "/api/version", version),
        ApiRoute("GET", "/api/tags", list_tags),
        ApiRoute("GET", "/api/ps", list_running),
        ApiRoute("POST", "/api/show", show, refuses=(404,)),
        ApiRoute(
            "POST", "/api/chat", chat, {JSON: OllamaChatAnswer, LINES: (OllamaChatAnswer, OllamaChatDelta)}, asks=True
        ),
        ApiRoute(
            "POST",
            "/api/generate",
            generate,
            {JSON: OllamaTextAnswer, LINES: (OllamaTextAnswer, OllamaTextDelta)},
            asks=True,
        ),
        asked("/api/embed", embed),
        asked("/api/embeddings", older_embed),
    )


async def version(_: web.Request) -> OllamaVersion:
    """The version of Ollama's API that is followed, and beside it ours."""
    return {"version": OLLAMA_VERSION, "peerllm": peerllm.__version__}


async def list_tags(request: web.Request) -> OllamaModels:
    """The models of the household."""
    return tags(request.app)


async def list_running(request: web.Request) -> LoadedModels:
    """The models that can answer now."""
    return running(request.app)


async def show(request: web.Request, body: ShowBody) -> ShownModel:
    """What a model can do."""
    return await shown(request.app, body.asked())


async def chat(request: web.Request, body: OllamaChatBody) -> web.StreamResponse:
    """The model's answer to a chat; one without messages loads the model, or unloads it."""
    return await _answered(request, body, chat=True)


async def generate(request: web.Request, body: GenerateBody) -> web.StreamResponse:
    """The model's answer to a prompt; without one the model is loaded, or unloaded."""
    return await _answered(request, body, chat=False)


async def _answered(request: web.Request, body: OllamaChatBody | GenerateBody, chat: bool) -> web.StreamResponse:
    form, wanted = OllamaAnswers(body.model, chat), body.generation()
    if not wanted.load_only:
        return await tell(request, [wanted], form, body.streamed)
    repeat_of(request, wanted)  # says what is wrong with a key
    return json_response(form.loaded(await _loaded(request, wanted)))


async def _loaded(request: web.Request, wanted: Generation) -> str:
    """Why a request ended that says nothing: "load" or "unload"."""
    reason = ""
    async with aclosing(answer(request.app, wanted, caller_of(request), None)) as events:
        async for event in events:
            reason = event.reason if isinstance(event, AnswerEnds) else reason
    return reason


async def embed(request: web.Request, body: EmbedBody) -> OllamaVectors:
    """The vectors of texts, of length 1."""
    since = time.monotonic()
    made = await _vectors(request, body)
    return await asyncio.to_thread(body.answer, made, since)


async def older_embed(request: web.Request, body: OlderEmbedBody) -> OllamaVector:
    """The vector of a text, as long as the model has it."""
    return body.answer(await _vectors(request, body))


async def _vectors(request: web.Request, body: EmbedBody | OlderEmbedBody) -> Vectors | None:
    wanted = body.generations()
    if wanted:
        return await vectors_of(request.app, wanted, caller_of(request))
    await _loaded(request, body.loading())
    return None
