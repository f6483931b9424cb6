"""Items: what a request to /v1/responses says so far, as messages for the model and as clients list them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from peerllm.api.core.generation import CalledTool, ChatMessage
from peerllm.api.error_answers import FieldError
from peerllm.api.openai.chat_requests import MAX_PARTS, arguments_of
from peerllm.api.openai.responses.response_objects import ResponsePart, ToldItem

REFERENCE = "item_reference"
_KINDS = ["message", "function_call", "function_call_output", "reasoning", REFERENCE]
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class ItemPart(Struct, omit_defaults=True):
    type: Annotated[str, Meta(extra_json_schema={"enum": [*_TEXTS, "refusal"]})]
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[list[ItemPart], Meta(max_length=MAX_PARTS)]


class ResponseItem(Struct, omit_defaults=True):
    """One of several kinds: a message, a call of a tool, what came of one, or what the model thought."""

    type: Annotated[str, Meta(extra_json_schema={"enum": _KINDS})] | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Parts | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | Parts | None = None
    summary: Parts | None = None

    @property
    def kind(self) -> str:
        """Of messages the type may be left out."""
        return self.type or ("message" if self.role is not None else "")

    def told(self) -> ToldItem:
        """As clients list it, where it has an id and messages_of takes it."""
        found: ToldItem = {"id": self.id or "", "type": "message", "status": "completed"}
        if self.kind == "message" and self.role is not None:
            found["role"], text = self.role, _text(self.content, "content")
            said: ResponsePart = {"type": "output_text", "text": text, "annotations": []}
            found["content"] = [said if self.role == "assistant" else {"type": "input_text", "text": text}]
        elif self.kind == "function_call":
            found["type"] = "function_call"
            found["call_id"], found["name"], found["arguments"] = self.call_id, self.name, self.arguments
        elif self.kind == "function_call_output":
            found["type"], found["call_id"] = "function_call_output", self.call_id
            found["output"] = _text(self.output, "output")
        else:
            found["type"] = "reasoning"
            found["summary"] = [{"type": "summary_text", "text": part.text or ""} for part in self.summary or ()]
        return found


def messages_of(items: Sequence[ResponseItem], earlier: int) -> list[ChatMessage]:
    """What chat templates see of them; what the model thought is left out. The first `earlier` are no input's.

    Calls belong to the message of the assistant before them.
    """
    found: list[ChatMessage] = []
    for index, item in enumerate(items):
        where = f"input[{index - earlier}]"
        match item.kind:
            case "message":
                if item.role is None:
                    raise FieldError(f"{where}.role is missing", f"{where}.role")
                role = "system" if item.role == "developer" else item.role
                found.append(ChatMessage(role, _text(item.content, f"{where}.content")))
            case "function_call":
                for name in ("call_id", "name"):
                    if not getattr(item, name):
                        raise FieldError(f"{where}.{name} is missing", f"{where}.{name}")
                call = CalledTool(item.call_id, item.name, arguments_of(item.arguments, f"{where}.arguments"))
                if not found or found[-1].role != "assistant":
                    found.append(ChatMessage("assistant", ""))
                found[-1] = replace(found[-1], tool_calls=(*found[-1].tool_calls, call))
            case "function_call_output":
                if not item.call_id:
                    raise FieldError(f"{where}.call_id is missing", f"{where}.call_id")
                found.append(ChatMessage("tool", _text(item.output, f"{where}.output"), tool_call_id=item.call_id))
            case "reasoning":
                pass
            case other:
                what = (
                    f"{where}: items of type {other[:40]!r} are not supported" if other else f"{where}.type is missing"
                )
                raise FieldError(what, where, "unsupported_content")
    return found


def _text(content: str | list[ItemPart] | None, where: str) -> str:
    """The text of a message or of a tool's result; FieldError for parts of another kind."""
    if content is None:
        raise FieldError(f"{where} must be a string or a list of text parts", where)
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if part.type != "refusal" and part.type not in _TEXTS:
            what = f"{place}: parts of type {part.type[:40]!r} cannot be read: models read text only here"
            raise FieldError(f"{what}, send input_text", place, "unsupported_content")
        if (part.refusal if part.type == "refusal" else part.text) is None:
            name = f"{place}.{'refusal' if part.type == 'refusal' else 'text'}"
            raise FieldError(f"{name} must be a string", name)
    return "".join(part.text or part.refusal or "" for part in content)
