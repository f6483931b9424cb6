"""Anthropic's route that gives answers."""

from __future__ import annotations

from aiohttp import web

from peerllm.api.anthropic.anthropic_answers import AnthropicAnswers
from peerllm.api.anthropic.anthropic_requests import AnthropicBody
from peerllm.api.bodies import read_body
from peerllm.api.core.telling import taking, tell

MESSAGES_PATH = "/v1/messages"


def add_anthropic(app: web.Application) -> None:
    app.router.add_post(MESSAGES_PATH, messages)


async def messages(request: web.Request) -> web.StreamResponse:
    with taking(request):
        body = await read_body(request, AnthropicBody)
        return await tell(request, [body.generation()], AnthropicAnswers(), bool(body.stream))
