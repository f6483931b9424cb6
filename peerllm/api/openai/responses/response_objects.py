"""The objects that /v1/responses answers with, their parts first, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from peerllm.api.text.tokens.logprob_objects import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ResponsePart(TypedDict):
    type: Literal["input_text", "output_text", "summary_text"]
    text: str
    annotations: NotRequired[list[Any]]
    logprobs: NotRequired[list[TokenLogprob]]


class ToldItem(TypedDict):
    """A message, what the model thinks (in `summary`), a call of a tool, or what came of one."""

    id: str
    type: Literal["message", "reasoning", "function_call", "function_call_output"]
    status: ItemStatus
    role: NotRequired[Literal["user", "assistant", "system", "developer"]]
    content: NotRequired[list[ResponsePart]]
    summary: NotRequired[list[ResponsePart]]
    call_id: NotRequired[str]
    name: NotRequired[str]
    arguments: NotRequired[str]
    output: NotRequired[str]


class ToldTool(TypedDict):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class ToldText(TypedDict):
    format: dict[str, Any]
    verbosity: NotRequired[str]


class ToldReasoning(TypedDict):
    effort: str | None
    summary: str | None


class ToldRequest(TypedDict):
    """What every response tells again of its request."""

    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    tools: list[ToldTool]
    tool_choice: Any
    parallel_tool_calls: bool
    text: ToldText
    reasoning: ToldReasoning
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    truncation: Literal["disabled"]
    store: bool
    background: Literal[False]
    service_tier: Literal["default"]
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseFailure(TypedDict):
    code: str
    message: str


class ResponseObject(ToldRequest):
    """`temperature` and `top_p` are those that the answer is drawn with."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[ToldItem]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None
    temperature: float
    top_p: float


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ListedItems(TypedDict):
    object: Literal["list"]
    data: list[ToldItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseEvent(TypedDict):
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    sequence_number: int
    response: ResponseObject


class ItemEvent(TypedDict):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: ToldItem


class PartEvent(TypedDict):
    """Of the part of a message (`content_index`) or of a thought (`summary_index`)."""

    type: Literal[
        "response.content_part.added",
        "response.content_part.done",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_part.done",
    ]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: NotRequired[int]
    summary_index: NotRequired[int]
    part: ResponsePart


class TextEvent(TypedDict):
    """More of such a part, or all of it."""

    type: Literal[
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
    ]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: NotRequired[int]
    summary_index: NotRequired[int]
    delta: NotRequired[str]
    text: NotRequired[str]
    logprobs: NotRequired[list[TokenLogprob]]


class CallEvent(TypedDict):
    """More of a call's arguments, or all of them."""

    type: Literal["response.function_call_arguments.delta", "response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: NotRequired[str]
    arguments: NotRequired[str]


class BrokenEvent(TypedDict):
    """The stream breaks off; the specification reads `error`, OpenAI's types what stands beside it."""

    type: Literal["error"]
    sequence_number: int
    error: dict[str, Any]
    code: str | None
    message: str
    param: str | None


RESPONSE_EVENTS = (ResponseEvent, ItemEvent, PartEvent, TextEvent, CallEvent, BrokenEvent)
