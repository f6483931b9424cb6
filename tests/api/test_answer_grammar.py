"""Answers' forms become grammars that llguidance keeps, or are refused with a reason in one line."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from peerllm.api.text.calls.call_forms import FORMS
from peerllm.api.text.calls.call_patterns import ToolSchemaError
from peerllm.api.text.model_text import ModelText
from peerllm.builtin import MODEL_DIR
from peerllm.byte_spelling import is_mark
from peerllm.engine.masks.mask_vocabulary import mask_tokenizer
from peerllm.errors import BadInputError
from tests.api.fake import byte_tokenizer

OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
NESTED = {  # as pydantic writes it: other fields are not forbidden
    "$defs": {"B": {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}},
    "type": "object", "properties": {"a": {"$ref": "#/$defs/B"}}, "required": ["a"],
}  # fmt: skip
KEPT = {"tools": [{"name": "f", "parameters": OPEN}], "keep": "needed", "parallel": False}


@pytest.fixture
def text() -> ModelText:
    return ModelText(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return LLTokenizer((MODEL_DIR / "tokenizer.json").read_text(), eos_token=[2])


def fits(tokenizer: Any, grammar: str, said: str) -> bool:
    """Whether a text is a whole answer."""
    matcher, ids = LLMatcher(tokenizer, grammar, log_level=0), tokenizer.tokenize_str(said, parse_special=True)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"kind": "json"}, ['{"x": [1, null]}', "{}"], ["[1]", "3", '{"x":\n1}', '{"x":  1}']),
        ({"kind": "schema", "schema": OPEN}, ['{"a":1}', '{"a": 1}'], ['{"a":"x"}', "{}", '{"a":1,"b":2}']),
        ({"kind": "schema", "schema": NESTED}, ['{"a":{"b":1}}'], ['{"a":{"b":1},"c":2}', '{"a":{"b":1,"c":2}}']),
        ({"kind": "schema", "schema": {**NESTED, "additionalProperties": True}}, ['{"a":{"b":1},"c":2}'], ["{}"]),
        ({"kind": "schema"}, ["3", '"x"', "[]"], ["x"]),
        ({"kind": "schema", "schema": {"type": "string", "format": "password"}}, ['"x"'], ["x"]),
        ({"kind": "schema", "schema": {"anyOf": [{"type": "string", "format": "date"}]}}, ['"2026-12-01"'], ['"x"']),
        ({"kind": "schema", "schema": {"const": {"format": "x"}}}, ['{"format":"x"}'], ["{}"]),
        ({"kind": "regex", "grammar": "(yes|no)/[0-9]{2}"}, ["yes/12"], ["yes/1", "maybe/12"]),
        ({"kind": "lark", "grammar": 'start: "a" b+\nb: "x" | "y"'}, ["axyx"], ["a", "ax "]),
        ({"kind": "lark", "grammar": 'start: <|user|> "hi"'}, ["<|user|>hi"], ["hi"]),
    ],
)
def test_a_form_allows_what_it_says(
    text: ModelText, tokenizer: Any, form: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = text.grammar(form, {}, opened=False)
    assert all(fits(tokenizer, grammar, said) for said in good)
    assert not any(fits(tokenizer, grammar, said) for said in bad)


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("<|user|>", "<|assistant|>")], ids=["text", "token"])
def test_a_thought_goes_before_what_is_asked_for(tokenizer: Any, marks: tuple[str, str]) -> None:
    text = ModelText(MODEL_DIR)
    text.marks = marks
    for form, calls, body in (
        ({"kind": "schema", "schema": OPEN}, {}, '{"a": 1}'),
        (None, KEPT, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'),
    ):
        grammar = text.grammar(form, calls, opened=True)
        assert fits(tokenizer, grammar, f'Is {{"b": 2}} right?\nNo.{marks[1]}\n\n{body}')
        assert not fits(tokenizer, grammar, body) and not fits(tokenizer, grammar, f"Hm.{marks[1]}Hm.{body}")
        assert fits(tokenizer, text.grammar(form, calls, opened=False), body)


DEEP: Any = {"type": "integer"}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"kind": "schema", "schema": {"type": "strin"}}, "Invalid type: strin"),
        ({"kind": "schema", "schema": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
        ({"kind": "schema", "schema": {"$ref": "#/$defs/nowhere"}}, "nowhere"),
        ({"kind": "schema", "schema": {"$ref": "https://example.com/a.json"}}, "example.com"),
        ({"kind": "schema", "schema": DEEP}, "recursion limit"),
        ({"kind": "regex", "grammar": "(a|b"}, "unclosed group"),
        ({"kind": "lark", "grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"kind": "lark", "grammar": "start: <|nope|>"}, "unknown special token"),
        ({"kind": "lark", "grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}, "too deeply nested"),
    ],
)
def test_what_is_no_form_is_refused_in_one_line(text: ModelText, form: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=r"^the answer's form cannot be used: ") as refused:
        text.grammar(form, {}, opened=False)
    assert words in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("parameters", "good", "bad"),
    [
        ({}, ["{}"], ['{"a": 1}']),
        ({"type": "object"}, ["{}", '{"a": 1}'], ["[]"]),
        ({"properties": {"a": {}}, "required": ["b"]}, ['{"b": 1}', '{"a": 1, "b": 2}'], ["{}"]),
        ({"properties": {"a": {"properties": {"b": {}}}}}, ['{"a": {"b": 1}}'], ['{"c": 1}', '{"a": {"c": 1}}']),
        ({"properties": {"a": {"items": {"properties": {"b": {}}}}}}, ['{"a": [{}]}'], ['{"a": [{"c": 1}]}']),
        ({"type": ["object", "null"], "properties": {"a": {}}}, ["{}"], ["null"]),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}, ['{"c": 1}'], ['{"c": "x"}']),
        ({"allOf": [{"properties": {"a": {"type": "null"}}}]}, ['{"a": null}'], ['{"a": 1}', "3"]),
    ],
)  # fmt: skip
def test_arguments_fit_their_schema(
    text: ModelText, tokenizer: Any, parameters: Any, good: list[str], bad: list[str]
) -> None:
    """An object that names its fields has no others."""
    kept = {"tools": [{"name": "f", "parameters": parameters}], "keep": "needed"}
    for form in ("tagged objects", "llama"):
        text.form = FORMS[form]
        grammar = text.grammar(None, kept, opened=False)
        call = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
        call = call if form != "llama" else '{"name": "f", "parameters": %s}'
        assert all(fits(tokenizer, grammar, call % one) for one in good), good
        assert not any(fits(tokenizer, grammar, call % one) for one in bad), bad


def test_references_hold_wherever_a_schema_is_put(text: ModelText, tokenizer: Any) -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}}}
    schema = {**tree, "$defs": {"leaf": {"type": "integer"}, "none": [{"$ref": "#/$defs/leaf"}]}}
    text.form = FORMS["llama"]
    grammar = text.grammar(None, {"tools": [{"name": "f", "parameters": schema}], "keep": "needed"}, opened=False)
    for value, right in (('{"left": {"left": {"leaf": 3}}}', True), ('{"left": {"leaf": "x"}}', False)):
        assert fits(tokenizer, grammar, f'{{"name": "f", "parameters": {value}}}') == right


def test_a_tool_that_cannot_be_kept_is_named(text: ModelText, tokenizer: Any) -> None:
    tools = [{"name": "good", "parameters": OPEN}, {"name": "bad", "parameters": {"type": "array"}, "strict": True}]
    with pytest.raises(ToolSchemaError, match=r"^the arguments of 'bad' cannot be kept to .*nsatisfiable"):
        text.grammar(None, {"tools": tools, "keep": "begun"}, opened=False)
    tools[1]["strict"] = False
    for keep in (tools, tools[:1]):
        grammar = text.grammar({"kind": "json"}, {"tools": keep, "keep": "begun"}, opened=False)
        call = '<tool_call>\n{"name": "good", "arguments": {"a": "x"}}\n</tool_call>'
        # All that are not strict are free where one of them cannot be kept, and kept where all can be.
        assert fits(tokenizer, grammar, call) == (keep is tools)
    text.form = FORMS["lfm"]
    with pytest.raises(ToolSchemaError, match=r"^calls of 'a b' cannot be kept"):
        text.grammar(None, {"tools": [{"name": "a b"}], "keep": "needed"}, opened=False)


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_are_those_that_masks_take_for_such(special: bool) -> None:
    made = byte_tokenizer()
    made.add_tokens(
        [AddedToken(one, special=special) for one in ("<tool_call>", "<|x|>", "[ARGS]", "<a", "b>", "c", "<>")]
    )
    for known in (LLTokenizer(made.to_str()), mask_tokenizer(made.to_str().encode(), [])):
        for number, token in made.get_added_tokens_decoder().items():
            assert is_mark(token.content, token.special) == known.is_special_token(number), token
