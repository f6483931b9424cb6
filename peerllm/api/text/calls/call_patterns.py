"""Rules of llguidance's Lark for an answer that calls tools: what a mask needs to hold a model to `tool_choice`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from peerllm.api.text.calls.answer_parts import Schemas
from peerllm.api.text.calls.call_forms import PYTHON_TAG, CallForm
from peerllm.errors import BadInputError

MAX_CALLS = 16  # in one answer that must call: a small model at a high temperature would go on for ever
ANY_TEXT = r"/(.|\n)*/"
_BARE_NAME = re.compile(r"[\w.\-]{1,256}")
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "$ref", "if"}


class ToolSchemaError(BadInputError):
    """Calls of a tool cannot be kept."""


@dataclass(frozen=True, slots=True)
class CallShape:
    """What stands around the arguments of calls: `mark`, `first`, a call, and `between` and a call again, `last`.

    In `before`, {name} is the tool's name as JSON has it, {bare} without quotation marks. Arguments are JSON in every
    form, because every form's reader takes JSON.
    """

    mark: str
    before: str
    behind: str = ""
    between: str = ""
    first: str = ""
    last: str = ""


_OBJECT = '{"name": {name}, "arguments": '
_SHAPES: Mapping[str, CallShape] = {
    "harmony": CallShape(
        "<|channel|>",
        "commentary to=functions.{bare} <|constrain|>json<|message|>",
        between="<|call|><|start|>assistant<|channel|>",
    ),
    "mistral": CallShape("[TOOL_CALLS]", _OBJECT, "}", ", ", "[", "]"),
    "mistral named": CallShape("[TOOL_CALLS]", "{bare}[ARGS]", between="[TOOL_CALLS]"),
    "listed": CallShape("<|tool_call|>", _OBJECT, "}", ", ", "[", "]"),
    "tagged objects": CallShape("<tool_call>", f"\n{_OBJECT}", "}\n</tool_call>", "\n<tool_call>"),
    "gemma 4": CallShape("<|tool_call>", "call:{bare}", "<tool_call|>", "<|tool_call>"),
    "functiongemma": CallShape("<start_function_call>", "call:{bare}", "<end_function_call>", "<start_function_call>"),
    "lfm": CallShape("<|tool_call_start|>", "{bare}", "", ", ", "[", "]<|tool_call_end|>"),
    "llama": CallShape("", "", between="; "),  # a call is one JSON object
}


class CallRules:
    """Rules for calls of `tools` in a form; `schemas` are those that the rules refer to, by the names of grammars.

    `ids` are those of the model's special tokens; other marks are written as text. `several`: more than one call.
    """

    def __init__(self, form: CallForm, tools: Schemas, ids: Mapping[str, int], several: bool) -> None:
        self._form, self._shape, self._ids, self._several = form, _SHAPES[form.name], ids, several
        self.schemas: dict[str, Mapping[str, Any]] = {}
        calls = [self._call(number, *tool) for number, tool in enumerate(tools.items())]
        numbers = range(len(calls))
        self.rules = [*calls, f"call: {' | '.join(f'call_{number}' for number in numbers)}"]
        more = f"({self._lark(self._shape.between)} call){{0,{MAX_CALLS - 1}}}" if several else ""
        self.rules += [
            f"begun: {self._lark(self._shape.first)} call {more} {self._lark(self._shape.last)}",
            f"calls: {self._lark(self._shape.mark)} begun",
        ]

    def _call(self, number: int, name: str, schema: Mapping[str, Any]) -> str:
        """Rule `call_N`."""
        before, grammar = self._shape.before, f"arguments_{number}"
        if self._form.bare:
            self.schemas[grammar] = _bare_call(name, schema)
            return f"call_{number}: @{grammar}"
        if "{bare}" in before and not _BARE_NAME.fullmatch(name):
            raise ToolSchemaError(f"calls of {name[:80]!r} cannot be kept: a name has letters, digits, '_', '-', '.'")
        self.schemas[grammar] = schema
        quoted = msgspec.json.encode(name).decode()
        pieces = re.split(r"(\{bare\}|\{name\})", before)
        named = {"{bare}": _literal(name), "{name}": _literal(quoted)}
        head = " ".join(named[one] if one in named else self._lark(one) for one in pieces)
        return f"call_{number}: {head} @{grammar} {self._lark(self._shape.behind)}"

    def free(self, thought: str) -> list[str]:
        """Rule `free`: any text, in which what begins as a call is one. It does not begin with the text `thought`."""
        if self._form.name == "harmony":
            return self._channels()
        mark = self._shape.mark or PYTHON_TAG
        outside = [r"\s{0,4}" + re.escape(thought).replace("/", r"\/")] if thought else []
        if self._form.bare:
            outside.append(r"\s*\{")
        said = " & ".join([ANY_TEXT, *(f"~/{one}(.|\\n)*/" for one in outside)])
        rules = [f"SAID: {said}", f"MORE: {ANY_TEXT}"]
        if mark in self._ids:
            rest, end = f"{self._lark(mark)} begun", "*" if self._several else "?"
            rules.append(f"free: SAID ({rest} {'MORE' if self._several else ''}){end}")
        else:
            rest = "(marked begun)* MORE" if self._several else ""
            rules += [f"first[lazy]: SAID {self._lark(mark)}", f"marked[lazy]: MORE {self._lark(mark)}"]
            rules.append(f"free: SAID | first begun {rest}")
        if self._form.bare:
            rules[-1] += " | begun"
        return rules

    def _channels(self) -> list[str]:
        said = self._lark("<|channel|>") + " /analysis|commentary|final/ " + self._lark("<|message|>")
        again = self._lark("<|end|><|start|>assistant")
        return [f"MORE: {ANY_TEXT}", f"said: {said} MORE", f"free: (said {again})* (said | calls)"]

    def _lark(self, text: str) -> str:
        return lark_of(text, self._ids)


def lark_of(text: str, ids: Mapping[str, int]) -> str:
    """A text as Lark has it: special tokens by their ids, the rest in quotation marks."""
    known = sorted((mark for mark in ids if mark and mark in text), key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, known))})", text) if known else [text]
    return " ".join(f"<[{ids[one]}]>" if one in ids else _literal(one) for one in pieces if one)


def _literal(text: str) -> str:
    return msgspec.json.encode(text).decode()


def argument_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """What masks keep arguments to: an object, in which objects that name their fields have no others."""
    found: dict[str, Any] = closed(schema or {"properties": {}})
    kind = found.get("type", "object")
    if kind == "object" or (isinstance(kind, list) and "object" in kind):
        return {**found, "type": "object"}
    return {"allOf": [{"type": "object"}, found]}  # which is refused with the reason


def closed(schema: Any) -> Any:
    """Without fields that the schema does not name: a model that may invent some will."""
    if not isinstance(schema, Mapping):
        return schema
    found, fields = dict(schema), schema.get("properties")
    if isinstance(fields, Mapping):
        found["properties"] = {name: closed(one) for name, one in fields.items()}
        required = schema.get("required")
        known = all(one in fields for one in required) if isinstance(required, list) else True
        if known and _OPEN.isdisjoint(found):
            found["additionalProperties"] = False
    if "items" in found:
        found["items"] = closed(found["items"])
    for name in ("$defs", "definitions"):
        if isinstance(parts := schema.get(name), Mapping):
            found[name] = {part: closed(one) for part, one in parts.items()}
    return found


def _bare_call(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"name": {"const": name}, "parameters": _moved(schema, "#/properties/parameters")}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _moved(schema: Any, place: str) -> Any:
    """With references that hold where it is put."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {name: _moved(one, place) for name, one in schema.items()}
    reference = found.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        found["$ref"] = place + reference[1:]
    return found
