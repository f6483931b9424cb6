"""The body of POST /v1/responses, and what is asked by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from msgspec import Meta, Struct
from msgspec.structs import replace

from peerllm.api.core.generation import (
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_TOOLS,
    AnswerForm,
    ChatMessage,
    Generation,
    OfferedTool,
    TokenCount,
    ToolName,
    TopLogprobs,
    checked,
)
from peerllm.api.error_answers import FieldError
from peerllm.api.openai.chat_requests import FormatKind, form_of
from peerllm.api.openai.openai_fields import Flag, SampledFields
from peerllm.api.openai.responses.response_items import ResponseItem, messages_of
from peerllm.api.openai.responses.response_objects import ToldRequest, ToldText, ToldTool

# What /v1/responses calls a Generation's fields, and what errors of other devices call those of a chat.
NAMES: Mapping[str, str] = {
    "answer_form": "text.format",
    "response_format": "text.format",
    "parallel_calls": "parallel_tool_calls",
    "logprobs": "top_logprobs",
    "messages": "input",
}
LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16
_ELSEWHERE = "conversation", "prompt", "background"  # what needs more than a model
_Unused = Annotated[Any, Meta(extra_json_schema={"type": "null"})]
Identifier = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]


class ResponseTool(Struct):
    type: Annotated[str, Meta(extra_json_schema={"const": "function"})]
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag = None

    def tool(self, where: str) -> OfferedTool:
        if self.type != "function":
            what = f"{where}: tools of type {self.type[:40]!r} are not supported, only functions of your own"
            raise FieldError(what, where, "unsupported_parameter")
        if self.name is None:
            raise FieldError(f"{where}.name is missing", f"{where}.name")
        return OfferedTool(self.name, self.description or "", self.parameters or {}, bool(self.strict))


class AllowedTool(Struct):
    name: str = ""


class ResponseToolChoice(Struct):
    """A function, or several of which the model may (or, with `mode` "required", must) choose."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["function", "allowed_tools"]})]
    name: str = ""
    mode: Literal["auto", "required", "none"] = "auto"
    tools: Annotated[list[AllowedTool], Meta(max_length=MAX_TOOLS)] = []

    def chosen(self, offered: Sequence[OfferedTool]) -> tuple[tuple[OfferedTool, ...], str]:
        """The tools that may be called, and the choice among them as a Generation has it."""
        if self.type == "function":
            if not self.name:
                raise FieldError("tool_choice.name is missing", "tool_choice.name")
            return tuple(offered), self.name
        if self.type != "allowed_tools":
            what = f"tool_choice: tools of type {self.type[:40]!r} are not supported, only functions of your own"
            raise FieldError(what, "tool_choice", "unsupported_parameter")
        names = {one.name for one in self.tools}
        unknown = names - {one.name for one in offered}
        if unknown or not names:
            what = f"there is no tool {min(unknown)[:80]!r} among the tools" if unknown else "allow one tool at least"
            raise FieldError(f"tool_choice.tools: {what}", "tool_choice.tools")
        return tuple(one for one in offered if one.name in names), self.mode


class TextFormat(Struct):
    """`regex` and `lark` are not OpenAI's; their text is in `grammar`."""

    type: FormatKind = "text"
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: Flag = None
    grammar: str | None = None

    def form(self) -> AnswerForm | None:
        return form_of(self.type, self.schema, self.grammar, "text.format")


class ResponseText(Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningBody(Struct):
    effort: str | None = None
    summary: str | None = None


class ResponseBody(SampledFields, kw_only=True):
    input: str | Annotated[list[ResponseItem], Meta(max_length=MAX_MESSAGES)] | None = None
    instructions: str | None = None
    previous_response_id: Identifier | None = None
    max_output_tokens: TokenCount | None = None
    max_tool_calls: TokenCount | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: Flag = None
    text: ResponseText | None = None
    reasoning: ReasoningBody | None = None
    top_logprobs: TopLogprobs | None = None
    include: list[str] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    store: Flag = None
    safety_identifier: Identifier | None = None
    prompt_cache_key: Identifier | None = None
    conversation: _Unused = None
    prompt: _Unused = None
    background: Annotated[bool, Meta(extra_json_schema={"const": False})] | None = None

    def items(self) -> list[ResponseItem]:
        """What the request itself says."""
        if isinstance(self.input, str):
            return [ResponseItem(type="message", role="user", content=self.input)]
        return self.input or []

    def generation(
        self, earlier: Sequence[ResponseItem] = (), items: Sequence[ResponseItem] | None = None
    ) -> Generation:
        """The answer to `earlier` items and the request's own; `items`: these, with those that are referred to."""
        for name in _ELSEWHERE:
            if getattr(self, name):
                raise FieldError(f"{name} is not supported", name, "unsupported_parameter")
        offered = tuple(one.tool(f"tools[{index}]") for index, one in enumerate(self.tools or ()))
        choice = self.tool_choice or ""
        tools, chosen = (offered, choice) if isinstance(choice, str) else choice.chosen(offered)
        wanted = Generation(
            model=self.model,
            messages=self._messages(earlier, self.items() if items is None else items),
            max_tokens=self.max_output_tokens,
            stops=self.stops,
            sampling=self.sampling(),
            tools=tools,
            tool_choice=chosen,
            parallel_calls=self.parallel_tool_calls is not False,
            answer_form=self.text.format.form() if self.text is not None and self.text.format is not None else None,
            # As with chats, only switching it off is sure to be meant.
            reasoning=False if self.reasoning is not None and self.reasoning.effort == "none" else None,
            logprobs=(self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in (self.include or ()) else None,
            user=self.user or self.safety_identifier or "",
        )
        return checked(wanted, NAMES)

    def _messages(self, earlier: Sequence[ResponseItem], own: Sequence[ResponseItem]) -> tuple[ChatMessage, ...]:
        """What the system says first as one message: most templates take no more."""
        messages = messages_of([*earlier, *own], len(earlier))
        if not messages:
            raise FieldError("input is missing", "input")
        if self.instructions:
            messages.insert(0, ChatMessage("system", self.instructions))
        begin = next((at for at, one in enumerate(messages) if one.role != "system"), len(messages))
        if begin > 1:
            whole = "\n\n".join(one.content for one in messages[:begin])
            messages[:begin] = [replace(messages[0], content=whole)]
        if len(messages) > MAX_MESSAGES:
            raise FieldError(f"input: more than {MAX_MESSAGES} messages, earlier ones included", "input")
        return tuple(messages)

    def told(self) -> ToldRequest:
        """What every response tells again of its request; FieldError if that cannot be told."""
        text = self.text or ResponseText()
        kept = text.format or TextFormat()
        form: dict[str, Any] = {"type": kept.type}
        if kept.type == "json_schema":
            form |= {"name": kept.name or "answer", "description": kept.description, "schema": kept.schema}
            form["strict"] = kept.strict is not False
        elif kept.grammar:
            form["grammar"] = kept.grammar
        reasoning = self.reasoning or ReasoningBody()
        tools: list[ToldTool] = [
            {
                "type": "function",
                "name": one.name or "",
                "description": one.description,
                "parameters": one.parameters,
                "strict": bool(one.strict),
            }
            for one in self.tools or ()
        ]
        said: ToldText = {"format": form}
        if text.verbosity:
            said["verbosity"] = text.verbosity
        for name, value in (("text.format", form), ("tools", tools)):
            try:
                orjson.dumps([[[value]]])
            except orjson.JSONEncodeError as error:
                raise FieldError(f"{name} is nested too deeply, or a number in it is too large", name) from error
        return {
            "instructions": self.instructions,
            "previous_response_id": self.previous_response_id,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "tools": tools,
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "text": said,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "top_logprobs": self.top_logprobs or 0,
            "truncation": "disabled",
            "store": self.store is not False,
            "background": False,
            "service_tier": "default",
            "metadata": self.metadata or {},
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "prompt_cache_key": self.prompt_cache_key,
        }

    def _choice(self) -> Any:
        choice = self.tool_choice or "auto"
        if isinstance(choice, str):
            return choice
        if choice.type == "function":
            return {"type": "function", "name": choice.name}
        tools = [{"type": "function", "name": one.name} for one in choice.tools]
        return {"type": "allowed_tools", "mode": choice.mode, "tools": tools}
