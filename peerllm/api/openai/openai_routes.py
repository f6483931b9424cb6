"""OpenAI's routes that give answers and list models."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from peerllm.api.anthropic.anthropic_models import VERSION_HEADER, model_info, model_page
from peerllm.api.bodies import read_body
from peerllm.api.core.caller import caller_of
from peerllm.api.core.embeddings import vectors_of
from peerllm.api.core.named_models import find_model, listed_models
from peerllm.api.core.telling import taking, tell
from peerllm.api.error_answers import json_response
from peerllm.api.openai.chat_answers import ChatAnswers
from peerllm.api.openai.chat_requests import ChatBody
from peerllm.api.openai.completion_answers import CompletionAnswers
from peerllm.api.openai.completion_requests import CompletionBody
from peerllm.api.openai.embedding_requests import EmbeddingBody
from peerllm.api.openai.responses.response_routes import add_responses
from peerllm.daemon.facade import ServedModel


def add_openai(app: web.Application) -> None:
    app.router.add_get("/v1/models", list_models)
    app.router.add_get("/v1/models/{id:.+}", one_model)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/embeddings", embeddings)
    add_responses(app)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    with taking(request):
        body = await read_body(request, ChatBody)
        return await tell(request, body.generations(), ChatAnswers(body), bool(body.stream))


async def completions(request: web.Request) -> web.StreamResponse:
    with taking(request):
        body = await read_body(request, CompletionBody)
        return await tell(request, body.generations(), CompletionAnswers(body), bool(body.stream))


async def embeddings(request: web.Request) -> web.Response:
    with taking(request):
        body = await read_body(request, EmbeddingBody)
        return json_response(body.answer(await vectors_of(request.app, body.generations(), caller_of(request))))


async def list_models(request: web.Request) -> web.Response:
    """Those that are about to be started here come last. Anthropic's clients have it in their form."""
    if VERSION_HEADER in request.headers:
        return json_response(model_page(listed_models(request.app), request.query))
    return json_response({"object": "list", "data": [_object(model) for model in listed_models(request.app)]})


async def one_model(request: web.Request) -> web.Response:
    """One of them, 404 if there is none of that name."""
    told = model_info if VERSION_HEADER in request.headers else _object
    return json_response(told(find_model(request.app, request.match_info["id"])))


def _object(model: ServedModel) -> dict[str, Any]:
    """OpenAI's model object, with what is ours beside it."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "peerllm",
        "model": model.model,
        "state": model.state,
        "reason": model.reason,
        "message": model.message,
        "progress": model.progress,
        "context": model.context,
    }
