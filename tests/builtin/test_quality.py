"""The shipped model, computed in float32 with greedy choice, on a sample of the held-out set."""

from __future__ import annotations

import pytest

from peerllm.builtin.answering import Answerer, one
from peerllm.builtin.evaluate import held_out_commands, same_action, share

SAMPLE = 100
GOAL = 0.9


@pytest.fixture(scope="module")
def model() -> Answerer:
    return Answerer()


def test_held_out_commands_give_the_exact_action(model: Answerer) -> None:
    asked = held_out_commands(SAMPLE)
    answers = model.answers([one(command.said) for command in asked])
    assert share([same_action(a, c.answer) for a, c in zip(answers, asked, strict=True)]) >= GOAL


def test_it_says_what_it_is(model: Answerer) -> None:
    (answer,) = model.answers([one("Who are you?")])
    assert "built-in model of peerllm" in answer


def test_it_goes_on_from_the_command_before(model: Answerer) -> None:
    talk = one("Turn on the kitchen light.")
    talk += [{"role": "assistant", "content": model.answers([talk])[0]}, *one("And in the bedroom?")]
    (answer,) = model.answers([talk])
    assert answer.endswith('{"action":"light.on","room":"bedroom"}')
