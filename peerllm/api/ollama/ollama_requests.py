"""The bodies of /api/chat and /api/generate, and what is asked by them. Options that nobody knows are skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from peerllm.api.core.generation import (
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOKENS,
    MAX_TOOLS,
    AnswerForm,
    AnySeed,
    CalledTool,
    ChatMessage,
    FrequencyPenalty,
    Generation,
    MinP,
    Name,
    OfferedTool,
    PresencePenalty,
    RepetitionPenalty,
    SamplingOptions,
    Temperature,
    ToolName,
    TopK,
    TopLogprobs,
    TopP,
    checked,
    seed_of,
)
from peerllm.api.error_answers import FieldError
from peerllm.api.ollama.keep_alive import KeepAlive, seconds_of

MAX_CONTEXT_IDS = 1 << 20  # more than any context holds
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
NAMES: Mapping[str, str] = {"answer_form": "format"}
Format = str | dict[str, Any] | None
OllamaStop = Annotated[str, Meta(max_length=MAX_STOP_CHARS)]  # n8n sends "" where a field is left empty


class OllamaOptions(Struct, kw_only=True):
    """`num_ctx` is skipped: a household's model has the context that it was planned for."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    min_p: MinP | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: PresencePenalty | None = None
    frequency_penalty: FrequencyPenalty | None = None
    seed: AnySeed | None = None
    num_predict: int | None = None
    stop: OllamaStop | Annotated[list[OllamaStop], Meta(max_length=MAX_STOPS)] | None = None
    keep_alive: KeepAlive = None  # here, and the next, n8n has them
    format: Format = None

    def sampling(self) -> SamplingOptions:
        return SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed_of(self.seed),
        )


class OllamaFields(Struct, kw_only=True):
    model: Name
    stream: bool | None = None
    options: OllamaOptions | None = None
    keep_alive: KeepAlive = None
    format: Format = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None  # without `logprobs` without effect, as there

    @property
    def streamed(self) -> bool:
        """What is not said is streamed."""
        return self.stream is not False

    def shared(self) -> dict[str, Any]:
        """The fields of a Generation that chats and texts have in common."""
        options = self.options or OllamaOptions()
        most, stop = options.num_predict or 0, options.stop
        return {
            "model": self.model,
            "max_tokens": min(most, MAX_TOKENS) if most > 0 else None,
            "stops": tuple(one for one in ([stop] if isinstance(stop, str) else stop or ()) if one),
            "sampling": options.sampling(),
            "answer_form": _answer_form(self.format or options.format),
            "reasoning": self.think,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "keep_alive_s": seconds_of(options.keep_alive if self.keep_alive is None else self.keep_alive),
        }

    def loading(self) -> Generation:
        """What is asked where nothing is said."""
        return Generation(model=self.model, keep_alive_s=self.shared()["keep_alive_s"], load_only=True)


class OllamaFunctionCall(Struct):
    name: str
    arguments: dict[str, Any] = {}


class OllamaToolCall(Struct):
    function: OllamaFunctionCall
    id: str = ""


class OllamaMessage(Struct):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def message(self, where: str) -> ChatMessage:
        _no_images(self.images, f"{where}.images")
        calls = (CalledTool(one.id, one.function.name, one.function.arguments) for one in self.tool_calls or ())
        return ChatMessage(
            self.role,
            self.content or "",
            tool_calls=tuple(calls),
            tool_call_id=self.tool_call_id or "",
            name=self.tool_name or "",
        )


class OllamaFunction(Struct):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OllamaTool(Struct):
    function: OllamaFunction

    def tool(self) -> OfferedTool:
        return OfferedTool(self.function.name, self.function.description or "", self.function.parameters or {})


class OllamaChatBody(OllamaFields, kw_only=True):
    messages: Annotated[list[OllamaMessage], Meta(max_length=MAX_MESSAGES)] = []
    tools: Annotated[list[OllamaTool], Meta(max_length=MAX_TOOLS)] | None = None

    def generation(self) -> Generation:
        """Where nothing is said, the model is only to be loaded."""
        messages = tuple(one.message(f"messages[{index}]") for index, one in enumerate(self.messages))
        wanted = Generation(messages=messages, tools=tuple(one.tool() for one in self.tools or ()), **self.shared())
        return checked(wanted, NAMES) if messages else self.loading()


class GenerateBody(OllamaFields, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: Annotated[list[TokenId], Meta(max_length=MAX_CONTEXT_IDS)] | None = None
    images: list[Any] | None = None

    def generation(self) -> Generation:
        """Where nothing is said, the model is only to be loaded."""
        _no_images(self.images, "images")
        prompt, system, suffix = self.prompt or "", self.system or "", self.suffix or ""
        shared = {**self.shared(), "after": tuple(self.context or ()), "tells_ids": not self.raw}
        if self.template:
            raise FieldError("template is not supported: the model has its own; with raw the prompt is all", "template")
        if self.raw and (system or self.context):
            raise FieldError("raw mode does not support system or context", "raw")
        if not prompt and not suffix:
            return self.loading()
        if self.raw or suffix:
            return checked(Generation(prompt=prompt, suffix=suffix, **shared), NAMES)
        said = [ChatMessage("system", system)] if system else []
        return checked(Generation(messages=(*said, ChatMessage("user", prompt)), **shared), NAMES)


def _answer_form(given: Format) -> AnswerForm | None:
    if not given:
        return None
    if isinstance(given, dict):
        return AnswerForm("schema", given)
    if given != "json":
        raise FieldError('format must be "json" or a JSON schema', "format")
    return AnswerForm("json")


def _no_images(images: list[Any] | None, where: str) -> None:
    if images:
        raise FieldError(f"{where} cannot be read: models read text only here", where, "unsupported_content")
