"""OpenAI's routes that give answers and list models."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from peerllm.api.core.caller import caller_of
from peerllm.api.core.embeddings import vectors_of
from peerllm.api.core.named_models import find_model, listed_models
from peerllm.api.core.telling import tell
from peerllm.api.openai.chat_answers import ChatAnswers
from peerllm.api.openai.chat_requests import ChatBody
from peerllm.api.openai.completion_answers import CompletionAnswers
from peerllm.api.openai.completion_requests import CompletionBody
from peerllm.api.openai.embedding_requests import EmbeddingBody
from peerllm.api.openai.openai_objects import (
    ChatCompletion,
    ChatCompletionDelta,
    OpenAIModel,
    OpenAIModels,
    OpenAIVectors,
    StreamEnd,
    TextCompletion,
)
from peerllm.api.routes.api_route import JSON, ApiRoute, add_routes
from peerllm.api.streams import SSE
from peerllm.daemon.facade import ServedModel


def add_openai(app: web.Application) -> None:
    asked = partial(ApiRoute, "POST", asks=True)
    add_routes(
        app,
        ApiRoute("GET", "/v1/models", list_models),
        ApiRoute("GET", "/v1/models/{id:.+}", one_model, refuses=(404,)),
        ApiRoute(
            "POST",
            "/v1/chat/completions",
            chat_completions,
            {JSON: ChatCompletion, SSE: (ChatCompletionDelta, StreamEnd)},
            asks=True,
        ),
        asked("/v1/completions", completions, {JSON: TextCompletion, SSE: (TextCompletion, StreamEnd)}),
        asked("/v1/embeddings", embeddings),
    )


async def chat_completions(request: web.Request, body: ChatBody) -> web.StreamResponse:
    """The model's answer to a chat."""
    return await tell(request, body.generations(), ChatAnswers(body), bool(body.stream))


async def completions(request: web.Request, body: CompletionBody) -> web.StreamResponse:
    """How the model continues a text."""
    return await tell(request, body.generations(), CompletionAnswers(body), bool(body.stream))


async def embeddings(request: web.Request, body: EmbeddingBody) -> OpenAIVectors:
    """The vectors of texts."""
    return body.answer(await vectors_of(request.app, body.generations(), caller_of(request)))


async def list_models(request: web.Request) -> OpenAIModels:
    """The models of the household. Those that are about to be started here come last."""
    return {"object": "list", "data": [_object(model) for model in listed_models(request.app)]}


async def one_model(request: web.Request) -> OpenAIModel:
    """A model of the household."""
    return _object(find_model(request.app, request.match_info["id"]))


def _object(model: ServedModel) -> OpenAIModel:
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
