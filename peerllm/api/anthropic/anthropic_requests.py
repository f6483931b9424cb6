"""The body of POST /v1/messages, and what is asked by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from peerllm.api.core.generation import (
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_STOPS,
    MAX_TOOLS,
    AnswerForm,
    CalledTool,
    ChatMessage,
    Generation,
    Name,
    OfferedTool,
    SamplingOptions,
    StopString,
    TokenCount,
    ToolName,
    TopK,
    TopP,
    checked,
)
from peerllm.api.error_answers import FieldError

MAX_BLOCKS = 1024  # of one message's content


class ResultPart(Struct):
    type: Annotated[str, Meta(extra_json_schema={"const": "text"})]
    text: str | None = None


BLOCK_TYPES = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
BlockType = Annotated[str, Meta(extra_json_schema={"enum": list(BLOCK_TYPES)})]


class ContentBlock(Struct):
    """One of several kinds: text, a call of a tool (`id`, `name`, `input`), or what came of one."""

    type: BlockType
    text: str | None = None
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: str | Annotated[list[ResultPart], Meta(max_length=MAX_BLOCKS)] | None = None


Content = str | Annotated[list[ContentBlock], Meta(max_length=MAX_BLOCKS)]


class AnthropicMessage(Struct):
    role: Literal["user", "assistant"]
    content: Content

    def messages(self, where: str) -> list[ChatMessage]:
        """What came of calls, each in a message of its own, then what is said."""
        if isinstance(self.content, str):
            return [ChatMessage(self.role, self.content)]
        calls, results, others = [], [], []
        for index, block in enumerate(self.content):
            place = f"{where}[{index}]"
            if block.type == "tool_use" and self.role == "assistant":
                if not block.name:
                    raise FieldError(f"{place}.name is missing", f"{place}.name")
                calls.append(CalledTool(block.id, block.name, block.input))
            elif block.type == "tool_result" and self.role == "user":
                text = _text_of_result(block.content, f"{place}.content")
                results.append(ChatMessage("tool", text, tool_call_id=block.tool_use_id))
            else:
                others.append((place, block))
        text = _joined(others)
        if results and not text:
            return results
        return [*results, ChatMessage(self.role, text, tool_calls=tuple(calls))]


class RequestMetadata(Struct):
    user_id: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None


class ThinkingBody(Struct):
    type: str


class AnthropicTool(Struct):
    name: ToolName
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] = {}
    strict: bool | None = None

    def tool(self, where: str) -> OfferedTool:
        if self.type not in (None, "custom"):
            what = f"{where}: tools of type {self.type[:40]!r} are not supported, only functions of your own"
            raise FieldError(what, where, "unsupported_parameter")
        return OfferedTool(self.name, self.description or "", self.input_schema, bool(self.strict))


class AnthropicChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool | None = None

    def choice(self) -> str:
        """As a Generation has it."""
        if self.type == "tool" and not self.name:
            raise FieldError("tool_choice.name is missing", "tool_choice.name")
        return self.name if self.type == "tool" else "required" if self.type == "any" else self.type


class OutputForm(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    format: OutputForm | None = None


class UnknownThreadError(FieldError):
    """A client that hears this sends the whole conversation."""

    http_status = 404


class ThreadBody(Struct):
    """Of a conversation that Anthropic keeps: the first turn is as any, later ones are not known here."""

    type: str

    def check(self) -> None:
        if self.type == "continue":
            what = "thread: conversations are not kept here; send all messages"
            raise UnknownThreadError(what, "thread", "thread_not_found")


class AnthropicPrompt(Struct, kw_only=True):
    """All that the model reads: what /v1/messages/count_tokens counts."""

    model: Name
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: Content | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfig | None = None
    thread: ThreadBody | None = None

    def generation(self) -> Generation:
        if self.thread is not None:
            self.thread.check()
        if self.messages[-1].role == "assistant":
            raise FieldError(
                "messages must end with one of the user: an answer cannot be begun for the model", "messages"
            )
        system = text_of_blocks(self.system or "", "system")
        messages = [ChatMessage("system", system)] if system else []
        for index, one in enumerate(self.messages):
            messages += one.messages(f"messages[{index}].content")
        tools = (one.tool(f"tools[{index}]") for index, one in enumerate(self.tools or ()))
        choice = self.tool_choice
        form = self.output_config.format if self.output_config is not None else None
        wanted = Generation(
            model=self.model,
            messages=tuple(messages),
            tools=tuple(tools),
            tool_choice=choice.choice() if choice is not None else "",
            parallel_calls=choice is None or not choice.disable_parallel_tool_use,
            reasoning=self.thinking is not None and self.thinking.type != "disabled",
            answer_form=AnswerForm("schema", form.schema) if form is not None else None,
        )
        return checked(wanted, {"answer_form": "output_config.format"})


class AnthropicBody(AnthropicPrompt, kw_only=True):
    max_tokens: TokenCount
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    metadata: RequestMetadata | None = None

    def generation(self) -> Generation:
        return replace(
            super().generation(),
            max_tokens=self.max_tokens,
            stops=tuple(self.stop_sequences or ()),
            sampling=SamplingOptions(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k),
            user=(self.metadata.user_id or "") if self.metadata is not None else "",
        )


def text_of_blocks(content: Content, where: str) -> str:
    """The text of a message, what the model thought before left out; FieldError for blocks of another kind."""
    if isinstance(content, str):
        return content
    return _joined([(f"{where}[{index}]", block) for index, block in enumerate(content)])


def _text_of_result(content: str | list[ResultPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return _joined([(f"{where}[{index}]", part) for index, part in enumerate(content)])


def _joined(blocks: Sequence[tuple[str, ContentBlock | ResultPart]]) -> str:
    texts = []
    for where, block in blocks:
        if block.type in ("thinking", "redacted_thinking"):
            continue
        if block.type != "text":
            what = f"{where}: blocks of type {block.type[:40]!r} cannot be read: models read text only here"
            raise FieldError(what, where, "unsupported_content")
        if block.text is None:
            raise FieldError(f"{where}.text must be a string", f"{where}.text")
        texts.append(block.text)
    return "\n".join(texts)
