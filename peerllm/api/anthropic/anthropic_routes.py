"""Anthropic's route that gives answers."""

from __future__ import annotations

from aiohttp import web

from peerllm.api.anthropic.anthropic_answers import AnthropicAnswers
from peerllm.api.anthropic.anthropic_objects import ANSWER_EVENTS, AnthropicAnswer
from peerllm.api.anthropic.anthropic_requests import AnthropicBody
from peerllm.api.core.telling import tell
from peerllm.api.routes.api_route import JSON, ApiRoute, add_routes
from peerllm.api.streams import SSE

MESSAGES_PATH = "/v1/messages"


def add_anthropic(app: web.Application) -> None:
    add_routes(app, ApiRoute("POST", MESSAGES_PATH, messages, {JSON: AnthropicAnswer, SSE: ANSWER_EVENTS}, asks=True))


async def messages(request: web.Request, body: AnthropicBody) -> web.StreamResponse:
    """The model's next message."""
    return await tell(request, [body.generation()], AnthropicAnswers(), bool(body.stream))
