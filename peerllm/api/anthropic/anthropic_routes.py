"""Anthropic's routes that give answers and count their prompts. Its list of models is under the path of OpenAI's."""

from __future__ import annotations

from aiohttp import web

from peerllm.api.anthropic.anthropic_answers import AnthropicAnswers
from peerllm.api.anthropic.anthropic_requests import AnthropicBody, AnthropicPrompt
from peerllm.api.bodies import read_body
from peerllm.api.core.asking import prompt_tokens
from peerllm.api.core.caller import caller_of
from peerllm.api.core.telling import taking, tell
from peerllm.api.error_answers import json_response

MESSAGES_PATH = "/v1/messages"


def add_anthropic(app: web.Application) -> None:
    app.router.add_post(MESSAGES_PATH, messages)
    app.router.add_post(MESSAGES_PATH + "/count_tokens", count_tokens)


async def messages(request: web.Request) -> web.StreamResponse:
    with taking(request):
        body = await read_body(request, AnthropicBody)
        return await tell(request, [body.generation()], AnthropicAnswers(), bool(body.stream))


async def count_tokens(request: web.Request) -> web.Response:
    with taking(request):
        wanted = (await read_body(request, AnthropicPrompt)).generation()
        return json_response({"input_tokens": await prompt_tokens(request.app, wanted, caller_of(request))})
