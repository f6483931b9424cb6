"""Answers of /v1/chat/completions: a message, or deltas of one."""

from __future__ import annotations

from typing import Any

from peerllm.api.core.telling import WholeAnswer
from peerllm.api.openai.chat_requests import ChatBody
from peerllm.api.openai.openai_answers import OpenAIAnswers


class ChatAnswers(OpenAIAnswers):
    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, body: ChatBody) -> None:
        super().__init__(body.n or 1, bool(body.return_token_ids), body.with_usage)

    def choice(self, answer: WholeAnswer, index: int) -> dict[str, Any]:
        """`reasoning_content` is not OpenAI's, but what other servers have."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"message": {**message, "reasoning_content": answer.thought} if answer.thought else message}

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks, and nothing yet."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str, thought: bool = False) -> dict[str, Any]:
        return {"delta": {"reasoning_content" if thought else "content": text} if text else {}}
