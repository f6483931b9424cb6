"""Anthropic's routes that give answers and count their prompts. Its list of models is under the path of OpenAI's."""

from __future__ import annotations

from aiohttp import web

from peerllm.api.anthropic.anthropic_answers import AnthropicAnswers
from peerllm.api.anthropic.anthropic_objects import ANSWER_EVENTS, AnthropicAnswer, AnthropicCount
from peerllm.api.anthropic.anthropic_requests import AnthropicBody, AnthropicPrompt
from peerllm.api.core.asking import prompt_tokens
from peerllm.api.core.caller import caller_of
from peerllm.api.core.telling import tell
from peerllm.api.routes.api_route import JSON, ApiRoute, add_routes
from peerllm.api.streams import SSE

MESSAGES_PATH = "/v1/messages"


def add_anthropic(app: web.Application) -> None:
    add_routes(
        app,
        ApiRoute("POST", MESSAGES_PATH, messages, {JSON: AnthropicAnswer, SSE: ANSWER_EVENTS}, asks=True),
        ApiRoute("POST", MESSAGES_PATH + "/count_tokens", count_tokens, asks=True),
    )


async def messages(request: web.Request, body: AnthropicBody) -> web.StreamResponse:
    """The model's next message."""
    return await tell(request, [body.generation()], AnthropicAnswers(), bool(body.stream))


async def count_tokens(request: web.Request, body: AnthropicPrompt) -> AnthropicCount:
    """How many tokens such a request has; a model that does not run is started for that."""
    return {"input_tokens": await prompt_tokens(request.app, body.generation(), caller_of(request))}
