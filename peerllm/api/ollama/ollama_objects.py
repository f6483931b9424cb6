"""The objects that Ollama's routes answer with, their parts first."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from peerllm.api.text.tokens.logprob_objects import TokenLogprob


class OllamaCalledFunction(TypedDict):
    name: str
    arguments: dict[str, Any]


class OllamaCall(TypedDict):
    id: str
    function: OllamaCalledFunction


class OllamaPart(TypedDict):
    """What an answer and its lines have beside their text."""

    thinking: NotRequired[str]
    tool_calls: NotRequired[list[OllamaCall]]


class OllamaSaid(OllamaPart):
    role: Literal["assistant"]
    content: str


class OllamaCounts(TypedDict):
    """Of a whole answer: why it ended, its tokens, and times in nanoseconds."""

    done_reason: str
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]


class OllamaHead(TypedDict):
    model: str
    created_at: str
    logprobs: NotRequired[list[TokenLogprob]]


class OllamaChatDelta(OllamaHead):
    message: OllamaSaid
    done: Literal[False]


class OllamaChatAnswer(OllamaHead, OllamaCounts):
    """Whole, or a stream's last line."""

    message: OllamaSaid
    done: Literal[True]


class OllamaTextDelta(OllamaHead, OllamaPart):
    response: str
    done: Literal[False]


class OllamaTextAnswer(OllamaHead, OllamaPart, OllamaCounts):
    """Whole, or a stream's last line."""

    response: str
    context: NotRequired[list[int]]  # token ids up to its end
    done: Literal[True]


class OllamaVectors(TypedDict):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: NotRequired[int]


class OllamaVector(TypedDict):
    embedding: list[float]


class OllamaVersion(TypedDict):
    """The version of Ollama's API that is followed, and beside it ours."""

    version: str
    peerllm: str


class OllamaDetails(TypedDict):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(TypedDict):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    context_length: int
    capabilities: list[str]


class LoadedModel(OllamaModel):
    expires_at: str
    size_vram: int


class OllamaModels(TypedDict):
    models: list[OllamaModel]


class LoadedModels(TypedDict):
    models: list[LoadedModel]


class ShownModel(TypedDict):
    modelfile: str
    parameters: str
    template: str
    license: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class PullLine(TypedDict):
    """How far a model is that is fetched."""

    status: str
    digest: NotRequired[str]
    total: NotRequired[int]
    completed: NotRequired[int]
