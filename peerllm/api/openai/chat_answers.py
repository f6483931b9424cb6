"""Answers of /v1/chat/completions: a message, or deltas of one."""

from __future__ import annotations

from collections.abc import Sequence

from peerllm.api.core.answer_events import ToolCallBegins, ToolCallDelta
from peerllm.api.core.telling import WholeAnswer
from peerllm.api.openai.chat_requests import ChatBody
from peerllm.api.openai.openai_answers import OpenAIAnswers
from peerllm.api.openai.openai_objects import (
    CallDelta,
    ChatLogprobs,
    ChatPart,
    ChatPartDelta,
    ChatSaid,
    FunctionDelta,
    OpenAICall,
)
from peerllm.api.text.calls.answer_parts import ToldToken
from peerllm.api.text.tokens.logprob_objects import logprob_objects


class ChatAnswers(OpenAIAnswers):
    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody) -> None:
        super().__init__(body.n or 1, bool(body.return_token_ids), body.with_usage)

    def choice(self, answer: WholeAnswer, index: int) -> ChatPart:
        text = answer.text or None if answer.calls else answer.text
        message: ChatSaid = {"role": "assistant", "content": text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            message["tool_calls"] = [_call(one.id, one.name, one.arguments) for one in answer.calls]
        return {"message": message}

    def opening(self, index: int) -> ChatPartDelta:
        """Who speaks, and nothing yet."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str, thought: bool = False) -> ChatPartDelta:
        if not text:
            return {"delta": {}}
        return {"delta": {"reasoning_content": text} if thought else {"content": text}}

    def logprobs(self, tokens: Sequence[ToldToken]) -> ChatLogprobs:
        return {"content": logprob_objects(tokens), "refusal": None}

    def call(self, event: ToolCallBegins | ToolCallDelta) -> ChatPartDelta:
        if isinstance(event, ToolCallBegins):
            function: FunctionDelta = {"name": event.name, "arguments": ""}
            begun: CallDelta = {"index": event.index, "id": event.id, "type": "function", "function": function}
            return {"delta": {"tool_calls": [begun]}}
        return {"delta": {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}}


def _call(call_id: str, name: str, arguments: str) -> OpenAICall:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
