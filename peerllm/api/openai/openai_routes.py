"""OpenAI's routes that give answers and list models."""

from __future__ import annotations

import asyncio
from functools import partial

from aiohttp import web

from peerllm.api.anthropic.anthropic_models import VERSION_HEADER, ModelPage, model_info, model_page
from peerllm.api.anthropic.anthropic_objects import AnthropicModel, AnthropicModels
from peerllm.api.core.caller import caller_of
from peerllm.api.core.embeddings import vectors_of
from peerllm.api.core.named_models import find_model, listed_models
from peerllm.api.core.telling import tell
from peerllm.api.error_answers import json_response
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
from peerllm.api.openai.responses.response_routes import add_responses
from peerllm.api.routes.api_route import JSON, ApiRoute, add_routes
from peerllm.api.streams import SSE
from peerllm.daemon.facade import ServedModel


def add_openai(app: web.Application) -> None:
    asked = partial(ApiRoute, "POST", asks=True)
    add_routes(
        app,
        ApiRoute("GET", "/v1/models", list_models, {JSON: (OpenAIModels, AnthropicModels)}),
        ApiRoute("GET", "/v1/models/{id:.+}", one_model, {JSON: (OpenAIModel, AnthropicModel)}, refuses=(404,)),
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
    add_responses(app)


async def chat_completions(request: web.Request, body: ChatBody) -> web.StreamResponse:
    """The model's answer to a chat."""
    return await tell(request, body.generations(), ChatAnswers(body), bool(body.stream))


async def completions(request: web.Request, body: CompletionBody) -> web.StreamResponse:
    """How the model continues a text."""
    return await tell(request, body.generations(), CompletionAnswers(body), bool(body.stream))


async def embeddings(request: web.Request, body: EmbeddingBody) -> OpenAIVectors:
    """The vectors of texts."""
    made = await vectors_of(request.app, body.generations(), caller_of(request))
    return await asyncio.to_thread(body.answer, made)  # of many texts it takes seconds


async def list_models(request: web.Request, *, query: ModelPage) -> web.Response:
    """The models of the household. Those that are about to be started here come last.

    With the header `anthropic-version` in the form that Anthropic's clients read, in pages.
    """
    models = listed_models(request.app)
    if VERSION_HEADER in request.headers:
        return json_response(model_page(models, query))
    return json_response({"object": "list", "data": [_object(model) for model in models]})


async def one_model(request: web.Request) -> web.Response:
    """A model of the household, with the header `anthropic-version` as Anthropic's clients read it."""
    model = find_model(request.app, request.match_info["id"])
    return json_response(model_info(model) if VERSION_HEADER in request.headers else _object(model))


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
