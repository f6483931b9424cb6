"""Answers of /v1/messages: a message, or the events from its start to its stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NotRequired, TypedDict, cast

from peerllm import request_ids
from peerllm.api.anthropic.anthropic_objects import (
    AnswerBlock,
    AnswerTokens,
    AnthropicAnswer,
    BlockDelta,
    BlockPart,
    BlockStart,
    BlockStop,
    MessageDelta,
    MessageHead,
    MessageStart,
    MessageStop,
    MessageUsage,
    StopReason,
    StreamSign,
)
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
        usage: MessageUsage = {
            "input_tokens": answer.begins.prompt_tokens,
            "output_tokens": answer.ends.usage.answer_tokens,
            "cache_read_input_tokens": answer.ends.usage.reused_tokens,
            "cache_creation_input_tokens": 0,
        }
        content: list[AnswerBlock] = []
        if answer.thought:
            content.append({"type": "thinking", "thinking": answer.thought, "signature": ""})
        text = answer.text + "".join(one.as_text() for one in answer.calls if one.given() is None)
        if text or not answer.calls:
            content.append({"type": "text", "text": text})
        for one in answer.calls:
            if (given := one.given()) is not None:
                content.append(_tool_use(one.id, one.name, given))
        return {**_message(answer.begins), "content": content, **_stop(answer.ends), "usage": usage}

    def pieces(self, choice: int, event: AnswerEvent, repeat: Repeat | None) -> Iterator[Piece]:
        match event:
            case AnswerWaits():
                yield comment(event.note), None
                yield StreamSign(type="ping"), None
            case AnswerBegins():
                usage: MessageUsage = {"input_tokens": event.prompt_tokens, "output_tokens": 0}
                none: MessageStop = {"stop_reason": None, "stop_sequence": None}
                message: AnthropicAnswer = {**_message(event), "content": [], **none, "usage": usage}
                yield MessageStart(type="message_start", message=message), None
            case TextDelta():
                if event.thought and self._kind != "thinking":
                    yield from self._next_block({"type": "thinking", "thinking": "", "signature": ""})
                elif not event.thought and self._kind != "text":
                    yield from self._next_block({"type": "text", "text": ""})
                if event.thought:
                    yield self._delta({"type": "thinking_delta", "thinking": event.text}), None
                else:
                    yield self._delta({"type": "text_delta", "text": event.text}), None
            case ToolCallBegins():
                yield from self._next_block(_tool_use(event.id, event.name, {}))
            case ToolCallDelta():
                yield self._delta({"type": "input_json_delta", "partial_json": event.arguments}), None
            case AnswerEnds():
                if self._kind not in ("text", "tool_use"):
                    yield from self._next_block({"type": "text", "text": ""})
                yield BlockStop(type="content_block_stop", index=self._blocks - 1), None
                tokens: AnswerTokens = {"output_tokens": event.usage.answer_tokens}
                yield MessageDelta(type="message_delta", delta=_stop(event), usage=tokens), None

    def _next_block(self, empty: AnswerBlock) -> Iterator[Piece]:
        if self._blocks:
            yield BlockStop(type="content_block_stop", index=self._blocks - 1), None
        self._blocks, self._kind = self._blocks + 1, empty["type"]
        yield BlockStart(type="content_block_start", index=self._blocks - 1, content_block=empty), None

    def _delta(self, delta: BlockPart) -> BlockDelta:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def closing(self) -> Iterator[Piece]:
        yield StreamSign(type="message_stop"), None


def _message(begins: AnswerBegins) -> MessageHead:
    return {"id": f"msg_{begins.id}", "type": "message", "role": "assistant", "model": begins.model}


def _tool_use(call_id: str, name: str, given: dict[str, Any]) -> AnswerBlock:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def _stop(ends: AnswerEnds) -> MessageStop:
    if ends.stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": ends.stop}
    reason: StopReason = "max_tokens" if ends.reason == "length" else "tool_use" if ends.calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


class ErrorDetails(TypedDict):
    error_code: str


class AnthropicErrorPart(ErrorMore):
    type: str
    message: str
    details: NotRequired[ErrorDetails]


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorPart
    request_id: str


def anthropic_error(facts: ErrorFacts) -> AnthropicError:
    """{"type": "error", "error": {"type", "message"}, "request_id"}, with what is ours beside them."""
    kind = _TYPES.get(facts.status, "invalid_request_error" if facts.status < 500 else "api_error")
    more = cast("AnthropicErrorPart", facts.more)
    error: AnthropicErrorPart = {**more, "type": kind, "message": facts.message}
    if facts.code:
        error["details"] = {"error_code": facts.code}
    return {"type": "error", "error": error, "request_id": request_ids.current()}
