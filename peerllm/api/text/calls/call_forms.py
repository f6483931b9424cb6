"""The forms in which families of models call tools, and which one a model has: its template and its tokens show it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peerllm.api.text.calls.answer_parts import Schemas
from peerllm.api.text.calls.call_bodies import CallBody, ChosenBody, JsonBody, ListBody, ReadCalls, WholeBody, loose
from peerllm.api.text.calls.harmony_reader import HARMONY_MARKS
from peerllm.api.text.calls.tagged_call import FUNCTION, FUNCTION_END, keyed_call, tagged_calls
from peerllm.chat_templates import has_channels

Kind = Literal["object", "list", "loose", "fence", "function"]  # what stands behind a mark
TAGS = {"<tool_call>": "</tool_call>"}
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class CallForm:
    """`marks`: what begins a call, and what ends it ("": nothing).

    `hidden`: the marks are special tokens, which are no text. `bare`: a call may be an object without a mark.
    """

    name: str
    marks: Mapping[str, str]
    kind: Kind = "object"
    hidden: bool = False
    bare: bool = False
    quote: str = ""  # around strings, where arguments are no JSON
    short_ids: bool = False  # its template takes no other ids of calls

    @property
    def kept(self) -> CallForm:
        """The form in which masks keep calls: one way for those that know several."""
        return FORMS["tagged objects"] if "<tool_call>" in self.marks else self

    @property
    def tokens(self) -> frozenset[str]:
        """Special tokens that must be seen in the text."""
        return frozenset({*self.marks, *self.marks.values(), self.quote, "[ARGS]", "[CALL_ID]"} - {""})

    def body(self, mark: str, schemas: Schemas, one: bool) -> CallBody:
        """What reads the text behind `mark`; `one`: up to the first call."""
        close = self.marks[mark]
        if mark == FUNCTION:
            return WholeBody(close, lambda text: tagged_calls(FUNCTION + text + FUNCTION_END, schemas), closed=True)
        if self.kind == "loose":
            return WholeBody(close, loose(self.quote), one=one)
        if self.kind == "list":
            return ListBody(one)
        if mark in TAGS:
            return ChosenBody(lambda text: _tagged(text, close, schemas, one))
        if mark.startswith(_FENCE):
            return ChosenBody(lambda text: _fenced(text, close, schemas, one))
        return JsonBody(schemas)


def _tagged(text: str, close: str, schemas: Schemas, one: bool) -> CallBody | None:
    """An object, Qwen's tags, or GLM's name and tags."""
    begun = text.lstrip()
    if not begun or (begun != FUNCTION and FUNCTION.startswith(begun)):
        return None
    if begun.startswith("{"):
        return JsonBody()
    if begun.startswith(FUNCTION):
        return WholeBody(close, lambda text: tagged_calls(text, schemas), one=one)
    return WholeBody(close, lambda text: keyed_call(text, schemas), closed=True)


def _fenced(text: str, close: str, schemas: Schemas, one: bool) -> CallBody | None:
    begun = text.lstrip()
    if not begun:
        return None
    return JsonBody(schemas) if begun.startswith("{") else WholeBody(close, _known(schemas), one=one)


def _known(schemas: Schemas) -> ReadCalls:
    """Calls of the tools that there are, and of nothing else."""

    def read(text: str) -> list[tuple[str, dict[str, Any]]]:
        calls = loose("")(text)
        if any(name not in schemas for name, _ in calls):
            raise ValueError("no call of a tool")
        return calls

    return read


_FENCE = "```"
FORMS: Mapping[str, CallForm] = {
    form.name: form
    for form in (
        CallForm("harmony", dict.fromkeys(HARMONY_MARKS, ""), hidden=True),  # read by HarmonyReader
        CallForm("gemma 4", {"<|tool_call>": "<tool_call|>"}, "loose", hidden=True, quote='<|"|>'),
        CallForm(
            "functiongemma", {"<start_function_call>": "<end_function_call>"}, "loose", hidden=True, quote="<escape>"
        ),
        CallForm("lfm", {"<|tool_call_start|>": "<|tool_call_end|>"}, "loose", hidden=True),
        CallForm("mistral", {"[TOOL_CALLS]": ""}, "list", hidden=True, short_ids=True),
        CallForm("mistral named", {"[TOOL_CALLS]": ""}, "list", hidden=True, short_ids=True),
        CallForm("listed", {"<|tool_call|>": "<|/tool_call|>"}, "list", hidden=True),
        CallForm("tagged functions", {**TAGS, FUNCTION: FUNCTION_END}),
        CallForm("tagged keys", TAGS),
        CallForm("tagged objects", TAGS),
        CallForm("llama", {PYTHON_TAG: ""}, hidden=True, bare=True),
        CallForm(
            "plain",  # of models that know no tools: they are told to use tags, and do as they have seen elsewhere
            {**TAGS, **{f"{_FENCE}{kind}\n": _FENCE for kind in ("json", "tool_call", "tool_code")}},
            bare=True,
        ),
    )
}
_SIGNS: tuple[tuple[str, str], ...] = (  # what a template has where its model calls in this form
    ("<|tool_call>", "gemma 4"),
    ("<start_function_call>", "functiongemma"),
    ("<|tool_call_start|>", "lfm"),
    ("[ARGS]", "mistral named"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call|>", "listed"),
    (FUNCTION, "tagged functions"),
    ("<arg_key>", "tagged keys"),
    ("<tool_call>", "tagged objects"),
    (PYTHON_TAG, "llama"),
)


def form_of(template: str, tokens: Collection[str]) -> CallForm:
    """`tokens`: those that were added to the tokenizer's vocabulary."""
    if has_channels(template):
        return FORMS["harmony"]
    if "tools" not in template:
        return FORMS["plain"]
    for places in ((template,), tokens):
        found = next((name for sign, name in _SIGNS if any(sign in place for place in places)), None)
        if found is not None:
            return FORMS[found]
    return FORMS["llama" if '"parameters"' in template else "plain"]
