"""The same faults on models whose layers keep something else: keys and values of a window only, or a recurrent state.

Tiny random models in float32, served by path. A recurrent state cannot be cut back to an earlier token, so whoever
lost it, or has too much of it, computes the answer again from its first token.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.e2e import tiny
from tests.lab.struck_answers import StruckAnswers, requests
from tests.lab.struck_household import StruckHousehold, serving

FULL = bool(os.environ.get("PEERLLM_FULL"))
pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600 if FULL else 900)]
NAMES = ("laptop", "mini-pc", "jetson")
KINDS = ("kill engine", "freeze", "kill own engine", "kill", "farewell", "unplug", "blip")
FAULTS = 35 if FULL else 3
TOKENS = 240
SEED = int(os.environ.get("PEERLLM_SEED", "7"))


@pytest.fixture(scope="module", params=sorted(tiny.KEEPING))
def struck(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[StruckHousehold]:
    directory = tmp_path_factory.mktemp("keeping")
    model = tiny.make(request.param, directory / request.param)
    with serving(directory, model, NAMES, holders=2, exact=True) as household:
        yield household


@pytest.fixture(scope="module")
def answers(struck: StruckHousehold) -> StruckAnswers:
    deployment = struck.deployment()
    assert deployment["plan"]["dtype"] == "float32"
    return StruckAnswers(struck, requests(TOKENS, model=deployment["name"]), least=TOKENS)


@pytest.mark.parametrize("number", range(FAULTS))
def test_an_answer_survives(struck: StruckHousehold, answers: StruckAnswers, number: int) -> None:
    dice, kind = random.Random(SEED + number), KINDS[number % len(KINDS)]
    struck.settled()
    host = dice.choice(struck.holders())
    answers.survive(kind, host, f"{kind} of {NAMES[host]}, seed {SEED + number}")


def test_what_was_lost_was_computed_again(answers: StruckAnswers) -> None:
    assert answers.moved > FAULTS
