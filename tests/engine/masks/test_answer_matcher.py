"""Masks against brute force: over a tiny vocabulary, of every answer that a bounded expression knows."""

from __future__ import annotations

import re
from itertools import product
from queue import SimpleQueue
from random import Random
from threading import Event
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from peerllm.engine.masks.mask_maker import AnswerMatcher, MadeMask, MaskError, MaskMaker
from peerllm.engine.messages import Constraint
from tests.sizes import FULL

BOUND_S = 30.0  # seconds
LONGEST = 7
TEXTS = ["".join(some) for length in range(LONGEST + 1) for some in product("ab", repeat=length)]


class Words:
    """A tokenizer of these words; the last is the end."""

    bos_token_id = None

    def __init__(self, words: list[str]) -> None:
        self.tokens = [*(word.encode() for word in words), b"</s>"]
        self.eos_token_id = len(words)
        self.special_token_ids = [len(words)]

    def __call__(self, text: str | bytes) -> list[int]:
        """The longest word first. What is forced in an answer is written as it is encoded."""
        rest, ids = text.encode() if isinstance(text, str) else text, list[int]()
        while rest:
            ids.append(max((one for one, word in enumerate(self.tokens) if rest.startswith(word)),
                           key=lambda one: len(self.tokens[one])))  # fmt: skip
            rest = rest[len(self.tokens[ids[-1]]) :]
        return ids


def tokenizer(words: list[str]) -> Any:
    return LLTokenizer(TokenizerWrapper(Words(words)))


def expression(chance: Random, leaves: int) -> str:
    """Over the letters a and b; its answers are bounded."""
    if leaves == 1:
        return chance.choice(["a", "b", "ab", "[ab]", "(ab)?", "(b){1,2}"])
    left = chance.randint(1, leaves - 1)
    one, other = expression(chance, left), expression(chance, leaves - left)
    return chance.choice([f"{one}{other}", f"({one}|{other})", f"({one}{other})?", f"({one}|{other}){{1,2}}"])


def longest(expression: str) -> int:
    return max((len(text) for text in TEXTS if re.fullmatch(expression, text)), default=0)


@pytest.mark.parametrize("seed", range(150 if FULL else 40))
def test_a_token_is_allowed_where_some_answer_goes_on_with_it(seed: int) -> None:
    chance = Random(seed)
    wanted = expression(chance, chance.randint(1, 4))
    while longest(wanted) == LONGEST:  # there may be longer ones
        wanted = expression(chance, chance.randint(1, 4))
    answers = [text for text in TEXTS if re.fullmatch(wanted, text)]
    words = ["a", "b", *chance.sample([text for text in TEXTS if 1 < len(text) < 4], chance.randint(0, 8))]
    end, vocabulary = len(words), len(words) + 1 + chance.randint(0, 60)  # models have more than their tokens
    form, known = Constraint(LLMatcher.grammar_from_regex(wanted), ""), tokenizer(words)
    matcher, said, ids = AnswerMatcher(known, form, vocabulary), "", list[int]()
    while True:
        mask = matcher.mask()
        assert len(mask) == (vocabulary + 7) // 8
        allowed = {one for one in range(8 * len(mask)) if mask[one // 8] >> one % 8 & 1}
        rests = [text[len(said) :] for text in answers if text.startswith(said)]
        goes_on = {at for at, word in enumerate(words) if any(rest.startswith(word) for rest in rests)}
        if "" in rests or len({rest[0] for rest in rests}) > 1:
            assert allowed == goes_on | ({end} if "" in rests else set()), (wanted, said, words)
        else:  # what is forced is said in the tokens in which it is encoded
            assert allowed and allowed <= goes_on, (wanted, said, words)
        assert AnswerMatcher(known, form, vocabulary, ids).mask() == mask, "rebuilt from its ids"
        if not goes_on:
            return
        token = chance.choice(sorted(allowed - {end}))
        matcher.advance(token)
        ids.append(token)
        said += words[token]
        assert matcher.count == len(ids)


def test_what_does_not_fit_is_an_error_at_once() -> None:
    wanted = Constraint(LLMatcher.grammar_from_regex("ab"), "")
    with pytest.raises(MaskError):
        AnswerMatcher(tokenizer(["a", "b"]), wanted, 3, [1])
    matcher = AnswerMatcher(tokenizer(["a", "b"]), wanted, 3, [0])
    with pytest.raises(MaskError):
        matcher.advance(0)
    with pytest.raises(MaskError):
        AnswerMatcher(tokenizer(["a", "b"]), Constraint("start: (", ""), 3)


def test_without_end_tokens_no_bit_says_that_it_is_over() -> None:
    wanted = Constraint(LLMatcher.grammar_from_regex("ab?"), "")
    matcher = AnswerMatcher(tokenizer(["a", "b"]), wanted, 3, [0], endless=True)
    assert matcher.mask()
    matcher.advance(1)
    assert not any(matcher.mask())


def test_a_token_that_comes_while_an_answer_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head still has the mask that it was told before, and need not wait for the grammar to be read again."""
    read, made = Event(), SimpleQueue[MadeMask]()

    def slowly(*_: object) -> Any:
        assert read.wait(BOUND_S)
        return tokenizer(["a", "b"])

    monkeypatch.setattr(MaskMaker, "_tokenizer", slowly)
    maker, key = MaskMaker(made.put), ("d" * 32, 1)
    try:
        maker.begin(key, Constraint(LLMatcher.grammar_from_regex("ab"), ""), 3, [2], [])
        maker.advance(key, 0)
        maker._going_on.submit(int).result(BOUND_S)  # it has looked at the token
        read.set()
        told = [made.get(timeout=BOUND_S) for _ in range(2)]
    finally:
        maker.close()
    assert [(one.count, one.mask, one.error) for one in told] == [(0, b"\1", ""), (1, b"\2", "")]
