"""The objects that OpenAI's routes answer with, their parts first. Those that end in `Delta` come in streams."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from peerllm.api.text.tokens.logprob_objects import TokenLogprob

StreamEnd = Literal["[DONE]"]  # the last event's data


class OpenAIModel(TypedDict):
    """OpenAI's model object, with what is ours behind `owned_by`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    model: str
    state: str
    reason: str
    message: str
    progress: float
    context: int


class OpenAIModels(TypedDict):
    object: Literal["list"]
    data: list[OpenAIModel]


class CalledFunction(TypedDict):
    name: str
    arguments: str


class OpenAICall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class CallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatSaid(TypedDict):
    """`reasoning_content` is not OpenAI's, but what other servers have."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[OpenAICall]]


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[CallDelta]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    """Lists side by side; the token itself is always among its `top_logprobs`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChoiceHead(TypedDict):
    """What all choices have."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    token_ids: NotRequired[list[int]]


class ChatPart(TypedDict):
    message: ChatSaid


class ChatPartDelta(TypedDict):
    delta: ChatDelta


class TextPart(TypedDict):
    text: str


class ChatChoice(ChoiceHead, ChatPart):
    logprobs: ChatLogprobs | None


class ChatChoiceDelta(ChoiceHead, ChatPartDelta):
    logprobs: ChatLogprobs | None


class TextChoice(ChoiceHead, TextPart):
    logprobs: TextLogprobs | None


class PromptDetails(TypedDict):
    cached_tokens: int


class OpenAIUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerHead(TypedDict):
    """What all objects of one answer have."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: None


class ChatCompletion(AnswerHead):
    choices: list[ChatChoice]
    usage: OpenAIUsage


class ChatCompletionDelta(AnswerHead):
    choices: list[ChatChoiceDelta]
    usage: NotRequired[OpenAIUsage | None]


class TextCompletion(AnswerHead):
    """Whole, or an event of a stream, where `usage` comes last if it is wanted."""

    choices: list[TextChoice]
    usage: NotRequired[OpenAIUsage | None]


class OpenAIVector(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class OpenAIVectors(TypedDict):
    object: Literal["list"]
    data: list[OpenAIVector]
    model: str
    usage: EmbeddingUsage
