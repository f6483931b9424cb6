"""Answers of /v1/messages: a message, or the events from its start to its stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peerllm.api.core.answer_events import AnswerBegins, AnswerEnds, AnswerEvent, AnswerWaits, TextDelta
from peerllm.api.core.kept.repeat import Repeat
from peerllm.api.core.telling import Piece, WholeAnswer
from peerllm.api.error_answers import ErrorFacts
from peerllm.api.streams import SSE, comment

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class AnthropicAnswers:
    """A telling.ToldForm: what the model thinks is a block, then its answer is one."""

    content_type = SSE
    named = True

    def __init__(self) -> None:
        self._block, self._thinking = 0, False  # which one is open, and of which kind; 0: none

    def whole(self, answers: Sequence[WholeAnswer]) -> object:
        (answer,) = answers
        usage = {
            "input_tokens": answer.begins.prompt_tokens,
            "output_tokens": answer.ends.usage.answer_tokens,
            "cache_read_input_tokens": answer.ends.usage.reused_tokens,
            "cache_creation_input_tokens": 0,
        }
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}]
        if answer.thought:
            content.insert(0, {"type": "thinking", "thinking": answer.thought, "signature": ""})
        return {**_message(answer.begins), "content": content, **_stop(answer.ends), "usage": usage}

    def pieces(self, choice: int, event: AnswerEvent, repeat: Repeat | None) -> Iterator[Piece]:
        match event:
            case AnswerWaits():
                yield comment(event.note), None
                yield {"type": "ping"}, None
            case AnswerBegins():
                usage = {"input_tokens": event.prompt_tokens, "output_tokens": 0}
                empty = {"content": list[Any](), "stop_reason": None, "stop_sequence": None}
                yield {"type": "message_start", "message": {**_message(event), **empty, "usage": usage}}, None
            case TextDelta():
                if not self._block or self._thinking != event.thought:
                    yield from self._next_block(event.thought)
                if event.thought:
                    delta = {"type": "thinking_delta", "thinking": event.text}
                else:
                    delta = {"type": "text_delta", "text": event.text}
                yield {"type": "content_block_delta", "index": self._block - 1, "delta": delta}, None
            case AnswerEnds():
                if not self._block or self._thinking:
                    yield from self._next_block(False)
                yield {"type": "content_block_stop", "index": self._block - 1}, None
                usage = {"output_tokens": event.usage.answer_tokens}
                yield {"type": "message_delta", "delta": _stop(event), "usage": usage}, None

    def _next_block(self, thinking: bool) -> Iterator[Piece]:
        if self._block:
            yield {"type": "content_block_stop", "index": self._block - 1}, None
        self._block, self._thinking = self._block + 1, thinking
        empty = {"type": "thinking", "thinking": "", "signature": ""} if thinking else {"type": "text", "text": ""}
        yield {"type": "content_block_start", "index": self._block - 1, "content_block": empty}, None

    def closing(self) -> Iterator[Piece]:
        yield {"type": "message_stop"}, None


def _message(begins: AnswerBegins) -> dict[str, Any]:
    return {"id": f"msg_{begins.id}", "type": "message", "role": "assistant", "model": begins.model}


def _stop(ends: AnswerEnds) -> dict[str, Any]:
    if ends.stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": ends.stop}
    return {"stop_reason": "max_tokens" if ends.reason == "length" else "end_turn", "stop_sequence": None}


def anthropic_error(facts: ErrorFacts) -> dict[str, Any]:
    """{"type": "error", "error": {"type", "message"}}, with what is ours beside them."""
    kind = _TYPES.get(facts.status, "invalid_request_error" if facts.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": facts.message, **facts.more}}
