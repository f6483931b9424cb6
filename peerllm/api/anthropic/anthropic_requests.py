"""The body of POST /v1/messages, and what is asked by it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from peerllm.api.core.generation import (
    MAX_MESSAGES,
    MAX_NAME_CHARS,
    MAX_STOPS,
    ChatMessage,
    Generation,
    Name,
    OfferedTool,
    SamplingOptions,
    StopString,
    TokenCount,
    TopK,
    TopP,
    checked,
)
from peerllm.api.error_answers import FieldError

MAX_BLOCKS = 1024  # of one message's content


class ContentBlock(Struct):
    type: str
    text: str | None = None


Content = str | Annotated[list[ContentBlock], Meta(max_length=MAX_BLOCKS)]


class AnthropicMessage(Struct):
    role: Literal["user", "assistant"]
    content: Content


class RequestMetadata(Struct):
    user_id: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None


class ThinkingBody(Struct):
    type: str


class AnthropicTool(Struct):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] = {}


class AnthropicBody(Struct, kw_only=True):
    model: Name
    max_tokens: TokenCount
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: Content | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    metadata: RequestMetadata | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: ThinkingBody | None = None

    def generation(self) -> Generation:
        if self.messages[-1].role == "assistant":
            raise FieldError(
                "messages must end with one of the user: an answer cannot be begun for the model", "messages"
            )
        system = text_of_blocks(self.system or "", "system")
        messages = [ChatMessage("system", system)] if system else []
        for index, one in enumerate(self.messages):
            messages.append(ChatMessage(one.role, text_of_blocks(one.content, f"messages[{index}].content")))
        tools = (OfferedTool(one.name, one.description or "", one.input_schema) for one in self.tools or ())
        wanted = Generation(
            model=self.model,
            messages=tuple(messages),
            max_tokens=self.max_tokens,
            stops=tuple(self.stop_sequences or ()),
            sampling=SamplingOptions(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k),
            tools=tuple(tools),
            reasoning=self.thinking is not None and self.thinking.type != "disabled",
            user=(self.metadata.user_id or "") if self.metadata is not None else "",
        )
        return checked(wanted, {})


def text_of_blocks(content: Content, where: str) -> str:
    """The text of a message, what the model thought before left out; FieldError for blocks of another kind."""
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(content):
        if block.type in ("thinking", "redacted_thinking"):
            continue
        if block.type != "text":
            what = f"{where}[{index}]: blocks of type {block.type[:40]!r} cannot be read: models read text only here"
            raise FieldError(what, f"{where}[{index}]", "unsupported_content")
        if block.text is None:
            raise FieldError(f"{where}[{index}].text must be a string", f"{where}[{index}].text")
        texts.append(block.text)
    return "\n".join(texts)
