"""Answers of /v1/messages: a message, or the events from its start to its stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypedDict

from peerllm.api.core.answer_events import (
    AnswerBegins,
    AnswerEnds,
    AnswerEvent,
    AnswerWaits,
    TextDelta,
    ToolCallBegins,
    ToolCallDelta,
)
from peerllm.api.core.kept.repeat import Repeat
from peerllm.api.core.telling import Piece, WholeAnswer
from peerllm.api.error_answers import ErrorFacts, ErrorMore
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
    """A telling.ToldForm: what the model thinks is a block, its answer is one, and so is each call of a tool."""

    content_type = SSE
    named = True

    def __init__(self) -> None:
        self._blocks, self._kind = 0, ""  # how many were begun, and which one is open

    def whole(self, answers: Sequence[WholeAnswer]) -> object:
        (answer,) = answers
        usage = {
            "input_tokens": answer.begins.prompt_tokens,
            "output_tokens": answer.ends.usage.answer_tokens,
            "cache_read_input_tokens": answer.ends.usage.reused_tokens,
            "cache_creation_input_tokens": 0,
        }
        content: list[dict[str, Any]] = []
        if answer.thought:
            content.append({"type": "thinking", "thinking": answer.thought, "signature": ""})
        cut = [one for one in answer.calls if one.given() is None]
        text = answer.text + "".join(f"{one.name}({one.arguments}" for one in cut)
        if text or not answer.calls:
            content.append({"type": "text", "text": text})
        for one in answer.calls:
            if one not in cut:
                content.append({**_tool_use(one.id, one.name), "input": one.given()})
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
                kind = "thinking" if event.thought else "text"
                if self._kind != kind:
                    block: dict[str, Any] = {"type": kind, kind: "", **({"signature": ""} if event.thought else {})}
                    yield from self._next_block(kind, block)
                yield self._delta({"type": f"{kind}_delta", kind: event.text}), None
            case ToolCallBegins():
                yield from self._next_block("tool_use", {**_tool_use(event.id, event.name), "input": {}})
            case ToolCallDelta():
                yield self._delta({"type": "input_json_delta", "partial_json": event.arguments}), None
            case AnswerEnds():
                if self._kind not in ("text", "tool_use"):
                    yield from self._next_block("text", {"type": "text", "text": ""})
                yield {"type": "content_block_stop", "index": self._blocks - 1}, None
                usage = {"output_tokens": event.usage.answer_tokens}
                yield {"type": "message_delta", "delta": _stop(event), "usage": usage}, None

    def _next_block(self, kind: str, empty: dict[str, Any]) -> Iterator[Piece]:
        if self._blocks:
            yield {"type": "content_block_stop", "index": self._blocks - 1}, None
        self._blocks, self._kind = self._blocks + 1, kind
        yield {"type": "content_block_start", "index": self._blocks - 1, "content_block": empty}, None

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def closing(self) -> Iterator[Piece]:
        yield {"type": "message_stop"}, None


def _message(begins: AnswerBegins) -> dict[str, Any]:
    return {"id": f"msg_{begins.id}", "type": "message", "role": "assistant", "model": begins.model}


def _tool_use(call_id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name}


def _stop(ends: AnswerEnds) -> dict[str, Any]:
    if ends.stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": ends.stop}
    reason = "max_tokens" if ends.reason == "length" else "tool_use" if ends.calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


class AnthropicErrorPart(ErrorMore):
    type: str
    message: str


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorPart


def anthropic_error(facts: ErrorFacts) -> AnthropicError:
    """{"type": "error", "error": {"type", "message"}}, with what is ours beside them."""
    kind = _TYPES.get(facts.status, "invalid_request_error" if facts.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": facts.message, **facts.more}}
