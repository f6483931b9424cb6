"""Answers' forms become grammars that llguidance keeps, or are refused with a reason in one line."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from peerllm.api.text.model_text import ModelText
from peerllm.builtin import MODEL_DIR
from peerllm.errors import BadInputError

OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CALL = {"kind": "schema", "schema": OPEN, "before": "<call>\n", "after": "\n</call>"}


@pytest.fixture(scope="module")
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
        ({"kind": "schema"}, ["3", '"x"', "[]"], ["x"]),
        ({"kind": "regex", "grammar": "(yes|no)/[0-9]{2}"}, ["yes/12"], ["yes/1", "maybe/12"]),
        ({"kind": "lark", "grammar": 'start: "a" b+\nb: "x" | "y"'}, ["axyx"], ["a", "ax "]),
        ({"kind": "lark", "grammar": 'start: <|user|> "hi"'}, ["<|user|>hi"], ["hi"]),
        (CALL, ['<call>\n{"a": 1}\n</call>'], ['{"a": 1}', '<call>\n{"a": 1}', '<call>{"a": 1}\n</call>']),
    ],
)
def test_a_form_allows_what_it_says(
    text: ModelText, tokenizer: Any, form: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = text.grammar(form, opened=False)
    assert all(fits(tokenizer, grammar, said) for said in good)
    assert not any(fits(tokenizer, grammar, said) for said in bad)


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("<|user|>", "<|assistant|>")], ids=["text", "token"])
def test_a_thought_goes_before_what_is_asked_for(tokenizer: Any, marks: tuple[str, str]) -> None:
    text = ModelText(MODEL_DIR)
    text.marks = marks
    grammar = text.grammar(CALL, opened=True)
    body = '<call>\n{"a": 1}\n</call>'
    assert fits(tokenizer, grammar, f'Is {{"b": 2}} right?\nNo.{marks[1]}\n\n{body}')
    assert not fits(tokenizer, grammar, body) and not fits(tokenizer, grammar, f"Hm.{marks[1]}Hm.{body}")
    assert fits(tokenizer, text.grammar(CALL, opened=False), body)


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
        text.grammar(form, opened=False)
    assert words in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400
