"""Answers of /v1/chat/completions: a message, or deltas of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peerllm.api.core.answer_events import ToolCallBegins, ToolCallDelta
from peerllm.api.core.telling import WholeAnswer
from peerllm.api.openai.chat_requests import ChatBody
from peerllm.api.openai.openai_answers import OpenAIAnswers
from peerllm.api.text.calls.answer_parts import ToldToken
from peerllm.api.text.tokens.logprob_objects import logprob_objects


class ChatAnswers(OpenAIAnswers):
    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody) -> None:
        super().__init__(body.n or 1, bool(body.return_token_ids), body.with_usage)

    def choice(self, answer: WholeAnswer, index: int) -> dict[str, Any]:
        """`reasoning_content` is not OpenAI's, but what other servers have."""
        text = answer.text or None if answer.calls else answer.text
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            message["tool_calls"] = [_call(one.id, one.name, one.arguments) for one in answer.calls]
        return {"message": message}

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks, and nothing yet."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str, thought: bool = False) -> dict[str, Any]:
        return {"delta": {"reasoning_content" if thought else "content": text} if text else {}}

    def logprobs(self, tokens: Sequence[ToldToken]) -> dict[str, Any]:
        return {"content": logprob_objects(tokens), "refusal": None}

    def call(self, event: ToolCallBegins | ToolCallDelta) -> dict[str, Any]:
        if isinstance(event, ToolCallBegins):
            return {"delta": {"tool_calls": [{"index": event.index, **_call(event.id, event.name, "")}]}}
        return {"delta": {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}}


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
