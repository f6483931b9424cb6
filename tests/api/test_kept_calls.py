"""Random walks within the grammars of calls: whatever a mask allows is read as calls that fit, in every form."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer

from peerllm.api.text.answer_grammar import KeptCalls, ModelMarks, grammar_of
from peerllm.api.text.calls.answer_parts import CallName, CallText, Words
from peerllm.api.text.calls.call_forms import FORMS
from peerllm.api.text.calls.call_patterns import MAX_CALLS, argument_schema
from peerllm.api.text.calls.call_reader import CallReader
from peerllm.api.text.calls.harmony_reader import HarmonyReader
from peerllm.api.text.calls.thinking_reader import ThinkingReader
from peerllm.api.text.reasoning import ReasoningSplitter
from peerllm.byte_spelling import is_mark
from peerllm.chat_templates import MARKS, Marks
from peerllm.engine.masks.mask_vocabulary import mask_tokenizer
from tests.api.fake import END, byte_tokenizer
from tests.sizes import FULL

SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer", "minimum": 0, "maximum": 20},
            "near": {"$ref": "#/$defs/place"},
        },
        "required": ["city"],
        "$defs": {"place": {"enum": ["sea", 'a "hill"', "<b>"]}},
    },
    "now": {},
    "a.b-c": {"properties": {"on": {"type": ["boolean", "null"]}}, "required": ["on"]},
}
FORM: Any = {"type": "object", "properties": {"name": {"enum": ["Bob", "now"]}}, "required": ["name"]}
EOS, EOS_ID = "<eos>", END + 1
ENDS, PRINTED = ({byte_tokenizer().token_to_id(sign) for sign in signs} for signs in ('"}]', map(chr, range(33, 127))))
LONGEST = 3000  # tokens
SEEDS, MOST_SEEDS = 20 if FULL else 1, 60
FORMS_AND_TOKENS = [*((form, special) for form in FORMS for special in (True, None)), ("mistral", False)]
Calls = list[tuple[str, str]]


@cache
def tokenizer(marks: frozenset[str], special: bool | None) -> Tokenizer:
    """In which the marks are tokens, special or not, or are mere text (None)."""
    made = byte_tokenizer()
    made.add_special_tokens([AddedToken(EOS, special=True)])
    tokens = [AddedToken(mark, special=bool(special)) for mark in sorted(marks) if special is not None]
    (made.add_special_tokens if special else made.add_tokens)(tokens)
    return made


@cache
def known(marks: frozenset[str], special: bool | None) -> Any:
    return mask_tokenizer(tokenizer(marks, special).to_str().encode(), [EOS_ID])


class Walk:
    """One answer: tokens at random, of those that are allowed; `wishes` come first where they are."""

    def __init__(self, grammar: str, marks: frozenset[str], special: bool | None, seed: int) -> None:
        self._chance, self._tokenizer = random.Random(seed), tokenizer(marks, special)
        self._marks = [self._tokenizer.token_to_id(mark) for mark in marks if special is not None]
        self._matcher = LLMatcher(known(marks, special), grammar, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def text(self, wishes: str = "", pause: int = 0) -> str:
        ids: list[int] = []
        wished = list(self._tokenizer.encode(wishes).ids)
        while len(ids) < LONGEST:
            mask = self._matcher.compute_bitmask()
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).tolist()
            assert allowed, self._matcher.get_error()
            token = self._next(allowed, wished if len(ids) >= pause else [])
            if token == EOS_ID:
                return str(self._tokenizer.decode(ids, skip_special_tokens=False))
            assert self._matcher.consume_token(token)
            ids.append(token)
        raise AssertionError(self._tokenizer.decode(ids)[-200:])

    def _next(self, allowed: list[int], wished: list[int]) -> int:
        if wished:
            if wished[0] in allowed:
                return wished.pop(0)
            wished.clear()
        if EOS_ID in allowed and self._chance.random() < 0.2:
            return EOS_ID
        marks = [one for one in allowed if one in self._marks]
        if marks and self._chance.random() < 0.2:
            return self._chance.choice(marks)
        ends = [one for one in allowed if one in ENDS]
        if ends and self._chance.random() < 0.3:
            return self._chance.choice(ends)
        printed = [one for one in allowed if one > EOS_ID or one in PRINTED]
        return self._chance.choice(printed or allowed)


def marked(form: str) -> frozenset[str]:
    return FORMS[form].kept.tokens | FORMS[form].tokens


def grammar(
    form: str,
    special: bool | None,
    answer: Any = None,
    thought: Marks | None = None,
    marks: frozenset[str] = frozenset(),
    **kept: Any,
) -> str:
    marks = marks or marked(form)
    added = tokenizer(marks, special).get_added_tokens_decoder().items()
    ids = {token.content: number for number, token in added if is_mark(token.content, token.special)}
    strict = {name: argument_schema(one) for name, one in SCHEMAS.items()}
    return grammar_of(answer, KeptCalls(strict, **kept), ModelMarks(ids, FORMS[form].kept, thought))


def heard(form: str, text: str, thought: Marks | None = None, one: bool = False) -> tuple[str, Calls]:
    """What is said, and calls with the text of their arguments."""
    schemas = {name: argument_schema(schema) for name, schema in SCHEMAS.items()}
    reader: Any = HarmonyReader(True, one)
    if form != "harmony":
        reader = ThinkingReader(ReasoningSplitter(thought, False), CallReader(FORMS[form].kept, schemas, one))
    said, calls = "", Calls()
    for part in [*reader.push(text), *reader.flush()]:
        match part:
            case Words():
                said += "" if part.thought else part.text
            case CallName():
                calls.append((part.name, ""))
            case CallText():
                calls[-1] = calls[-1][0], calls[-1][1] + part.text
    return said, calls


def check(calls: Calls) -> None:
    for name, arguments in calls:
        Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))
        assert json.loads(arguments).keys() <= SCHEMAS[name].get("properties", {}).keys()


@pytest.mark.parametrize(("form", "special"), FORMS_AND_TOKENS)
def test_what_must_be_calls_is_nothing_else(form: str, special: bool | None) -> None:
    for several in (True, False):
        made, counts = grammar(form, special, needed=True, several=several), set[int]()
        for seed in range(MOST_SEEDS):
            if seed >= SEEDS and (not several or len(counts) > 1):
                break
            text = Walk(made, marked(form), special, seed).text()
            said, calls = heard(form, text, one=not several)
            assert not said.strip() and 1 <= len(calls) <= (MAX_CALLS if several else 1), text
            check(calls)
            counts.add(len(calls))
        assert (len(counts) > 1) == several


def opening(form: str) -> str:
    """What a call begins with, up to where it is certain that it is one."""
    if form == "llama":
        return '{"name": "'
    if form == "harmony":
        return "<|channel|>commentary to="
    return next(iter(FORMS[form].kept.marks))


@pytest.mark.parametrize(("form", "special"), FORMS_AND_TOKENS)
def test_what_begins_as_a_call_is_one(form: str, special: bool | None) -> None:
    begun = opening(form)
    found = 0
    for several in (True, False):
        made = grammar(form, special, several=several)
        for seed in range(SEEDS):
            for wishes in ("", begun, "" if FORMS[form].bare else f"Well, <b> {begun}"):
                wish = wishes if form != "harmony" or not wishes.startswith("Well") else (
                    f"<|channel|>analysis<|message|>Well<|end|><|start|>assistant{begun}")  # fmt: skip
                text = Walk(made, marked(form), special, seed).text(wish)
                said, calls = heard(form, text, one=not several)
                check(calls)
                found += bool(calls)
                assert bool(calls) or not wish, text
                assert several or len(calls) <= 1, text
                assert begun not in said, text
    assert found >= 2 * SEEDS


@pytest.mark.parametrize("special", [True, False, None])
@pytest.mark.parametrize("marks", MARKS, ids=["think", "THINK", "channel"])
@pytest.mark.parametrize("form", ["tagged objects", "mistral"])
def test_a_thought_may_hold_anything(form: str, marks: Marks, special: bool | None) -> None:
    begin, end = (mark.strip() for mark in marks)
    known = marked(form) | {begin.removesuffix("thought"), end}
    made = grammar(form, special, thought=marks, marks=known)
    for seed in range(SEEDS):
        wish = f"{begin}\nIs {'it' if special is not None else opening(form)} right?{end}\n\n{opening(form)}"
        text = Walk(made, known, special, seed).text(wish)
        assert text.startswith(wish), text
        said, calls = heard(form, text, marks)
        assert calls and opening(form) not in said
        check(calls)
        unthought = Walk(made, known, special, seed).text("Is it? No.")
        assert unthought.startswith("Is it? No.")


@pytest.mark.parametrize(("form", "special"), FORMS_AND_TOKENS)
def test_a_text_has_its_form_where_there_is_no_call(form: str, special: bool | None) -> None:
    seen = set()
    made = grammar(form, special, {"kind": "schema", "schema": FORM})
    for seed in range(SEEDS):
        begin = "<|channel|>final<|message|>{" if form == "harmony" else '{"name": "Bob"'
        for wish in ("", opening(form), begin):
            said, calls = heard(form, Walk(made, marked(form), special, seed).text(wish))
            seen.add(bool(calls))
            check(calls)
            if calls:
                assert not said.strip()
            else:
                Draft202012Validator(FORM).validate(json.loads(said))
    assert seen == {True, False}


@pytest.mark.parametrize(("form", "special"), [("tagged objects", True), ("tagged objects", None), ("mistral", True)])
def test_calls_behind_the_first_are_kept_too(form: str, special: bool | None) -> None:
    made, begin = grammar(form, special), opening(form)
    call = Walk(grammar(form, special, needed=True, several=False), marked(form), special, 1).text()
    for text, right in ((f"A {call} B {call} C", True), (f"A {call} B {begin}x", False), (f"A {begin}x", False)):
        ids = tokenizer(marked(form), special).encode(text).ids
        matcher = LLMatcher(known(marked(form), special), made, log_level=0)
        assert (matcher.try_consume_tokens(ids) == len(ids)) == right, text


def test_where_answers_have_channels_one_is_for_thoughts() -> None:
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for answer, kept in ((None, {"needed": True}), ({"kind": "schema", "schema": FORM}, {})):
        made = grammar("harmony", True, answer, **kept)
        assert Walk(made, marked("harmony"), True, 1).text(f"{thought}<|channel|>").startswith(thought)
