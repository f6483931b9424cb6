"""The body of POST /v1/chat/completions, and what is asked by it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from peerllm.api.core.generation import (
    MAX_MESSAGES,
    MAX_TOOLS,
    AnswerForm,
    CalledTool,
    ChatMessage,
    Generation,
    OfferedTool,
    TokenCount,
    ToolName,
    TopLogprobs,
    checked,
)
from peerllm.api.error_answers import FieldError
from peerllm.api.openai.openai_fields import NAMES, Flag, NoList, NoObject, OpenAIFields, copies

MAX_PARTS = 1024  # of one message's content
FormatKind = Literal["text", "json_object", "json_schema", "regex", "lark"]


class ContentPart(Struct):
    type: Annotated[str, Meta(extra_json_schema={"const": "text"})]
    text: str | None = None


class FunctionCall(Struct):
    name: str
    arguments: str = ""  # a JSON object as text


class MessageToolCall(Struct):
    function: FunctionCall
    id: str = ""

    def call(self, where: str) -> CalledTool:
        given = arguments_of(self.function.arguments, f"{where}.function.arguments")
        return CalledTool(self.id, self.function.name, given)


class MessageBody(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Meta(min_length=1, max_length=MAX_PARTS)] | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def message(self, where: str) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise FieldError(f"{where}.content must be a string or a list of text parts", f"{where}.content")
        calls = (one.call(f"{where}.tool_calls[{index}]") for index, one in enumerate(self.tool_calls or ()))
        return ChatMessage(
            role="system" if self.role == "developer" else self.role,
            content=text_of(self.content or "", f"{where}.content"),
            tool_calls=tuple(calls),
            tool_call_id=self.tool_call_id or "",
            name=(self.name or "") if self.role == "tool" else "",
        )


class FunctionBody(Struct):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Struct):
    type: Literal["function"]
    function: FunctionBody

    def tool(self) -> OfferedTool:
        function = self.function
        parameters = function.parameters or {}
        return OfferedTool(function.name, function.description or "", parameters, bool(function.strict))


class ChosenFunction(Struct):
    name: str


class ChosenTool(Struct):
    function: ChosenFunction


class SchemaBody(Struct):
    schema: dict[str, Any]


class FormatBody(Struct):
    """`regex` and `lark` are not OpenAI's; their text is in `grammar`."""

    type: FormatKind | None = None
    json_schema: SchemaBody | None = None
    grammar: str | None = None

    def form(self) -> AnswerForm | None:
        if self.type == "json_schema" and self.json_schema is None:
            raise FieldError("response_format.json_schema is missing", "response_format.json_schema")
        schema = self.json_schema.schema if self.json_schema is not None else None
        return form_of(self.type, schema, self.grammar, "response_format")


def form_of(
    kind: FormatKind | None, schema: dict[str, Any] | None, grammar: str | None, where: str
) -> AnswerForm | None:
    """What a format of any name `where` asks for."""
    if kind == "json_schema":
        if schema is None:
            raise FieldError(f"{where}.schema is missing", f"{where}.schema")
        return AnswerForm("schema", schema)
    if kind in ("regex", "lark"):
        if not grammar:
            raise FieldError(f"{where}.grammar is missing", f"{where}.grammar")
        return AnswerForm(kind, grammar=grammar)
    return AnswerForm("json") if kind == "json_object" else None


class TemplateSwitches(Struct):
    """Not OpenAI's, but what other servers take."""

    enable_thinking: Flag = None


class ChatBody(OpenAIFields, kw_only=True):
    messages: Annotated[list[MessageBody], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    tools: Annotated[list[ToolBody], Meta(max_length=MAX_TOOLS)] | None = None
    parallel_tool_calls: Flag = None
    tool_choice: str | ChosenTool | None = None
    response_format: FormatBody | None = None
    logprobs: Flag = None
    top_logprobs: TopLogprobs | None = None
    functions: NoList | None = None
    audio: NoObject | None = None
    prediction: NoObject | None = None
    web_search_options: NoObject | None = None
    modalities: Annotated[list[str], Meta(extra_json_schema={"const": ["text"]})] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateSwitches | None = None

    def reasoning(self) -> bool | str | None:
        """Clients send an effort to any model, so only switching it off is sure to be meant."""
        switches = self.chat_template_kwargs
        off = self.reasoning_effort == "none" or (switches is not None and switches.enable_thinking is False)
        return False if off else None

    def generations(self) -> list[Generation]:
        """One for each answer that is wanted."""
        for name in ("functions", "audio", "prediction", "web_search_options"):
            if getattr(self, name):
                raise FieldError(f"{name} is not supported", name, "unsupported_parameter")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs: logprobs must be true, too", "top_logprobs")
        if self.modalities not in (None, ["text"]):
            raise FieldError("modalities: only text is supported", "modalities", "unsupported_parameter")
        choice = self.tool_choice
        wanted = Generation(
            model=self.model,
            messages=tuple(one.message(f"messages[{index}]") for index, one in enumerate(self.messages)),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            stops=self.stops,
            sampling=self.sampling(),
            tools=tuple(one.tool() for one in self.tools or ()),
            tool_choice=choice.function.name if isinstance(choice, ChosenTool) else choice or "",
            parallel_calls=self.parallel_tool_calls is not False,
            answer_form=self.response_format.form() if self.response_format is not None else None,
            reasoning=self.reasoning(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            user=self.user or "",
        )
        return copies(checked(wanted, NAMES), self.n or 1)


def arguments_of(text: str, where: str) -> dict[str, Any]:
    """Of an earlier call; FieldError if they are no JSON object."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise FieldError(f"{where} must be a JSON object as text", where) from error


def text_of(content: str | list[ContentPart], where: str) -> str:
    """The text of a message; FieldError for parts of another kind."""
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type != "text":
            what = f"{where}[{index}]: parts of type {part.type[:40]!r} cannot be read: models read text only here"
            raise FieldError(f"{what}, send text parts", f"{where}[{index}]", "unsupported_content")
        if part.text is None:
            raise FieldError(f"{where}[{index}].text must be a string", f"{where}[{index}].text")
    return "".join(part.text or "" for part in content)
