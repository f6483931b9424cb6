"""How an answer begins that calls one of certain tools: what a mask needs to hold a model to `tool_choice`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from peerllm.api.text.calls.answer_parts import Schemas
from peerllm.api.text.calls.call_forms import CallForm

# Before and behind the arguments, by the form's name; `{name}` is the tool's name as JSON has it, `{bare}` without
# quotation marks. Forms whose arguments are no JSON are left out: they are answered as "auto".
_AROUND: Mapping[str, tuple[str, str]] = {
    "harmony": ("<|channel|>commentary to=functions.{bare} <|constrain|>json<|message|>", "<|call|>"),
    "mistral": ('[TOOL_CALLS][{{"name": {name}, "arguments": ', "}}]"),
    "mistral named": ("[TOOL_CALLS]{bare}[ARGS]", ""),
    "listed": ('<|tool_call|>[{{"name": {name}, "arguments": ', "}}]<|/tool_call|>"),
    "tagged objects": ('<tool_call>\n{{"name": {name}, "arguments": ', "}}\n</tool_call>"),
    "plain": ('<tool_call>\n{{"name": {name}, "arguments": ', "}}\n</tool_call>"),
    "llama": ('{{"name": {name}, "parameters": ', "}}"),
}


@dataclass(frozen=True, slots=True)
class CallPattern:
    """`before`, a JSON object by `schema`, `behind`. Marks that are special tokens are written as their text."""

    name: str
    before: str
    schema: Mapping[str, Any]
    behind: str


def call_patterns(form: CallForm, schemas: Schemas) -> tuple[CallPattern, ...]:
    """One for each tool; the answer proper, behind what is thought, must begin with one of them. Empty: no mask."""
    if form.name not in _AROUND:
        return ()
    before, behind = _AROUND[form.name]
    found = []
    for name, schema in schemas.items():
        names = {"name": msgspec.json.encode(name).decode(), "bare": name}
        found.append(CallPattern(name, before.format(**names), schema, behind.format()))
    return tuple(found)
