"""The objects that Anthropic's routes answer with, their parts first, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnswerBlock(TypedDict):
    """Text, a thought, or a call of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


class MessageUsage(TypedDict):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: NotRequired[int]
    cache_creation_input_tokens: NotRequired[int]


class MessageStop(TypedDict):
    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageHead(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str


class AnthropicAnswer(MessageHead, MessageStop):
    content: list[AnswerBlock]
    usage: MessageUsage


class AnthropicCount(TypedDict):
    input_tokens: int


class AnthropicModel(TypedDict):
    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int | None
    max_tokens: int | None


class AnthropicModels(TypedDict):
    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: AnthropicAnswer


class BlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: int
    content_block: AnswerBlock


class BlockPart(TypedDict):
    """More of a block."""

    type: Literal["text_delta", "thinking_delta", "input_json_delta"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    partial_json: NotRequired[str]


class BlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: int
    delta: BlockPart


class BlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: int


class AnswerTokens(TypedDict):
    output_tokens: int


class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: MessageStop
    usage: AnswerTokens


class StreamSign(TypedDict):
    """Of life, or of the end."""

    type: Literal["ping", "message_stop"]


ANSWER_EVENTS = (MessageStart, BlockStart, BlockDelta, BlockStop, MessageDelta, StreamSign)
