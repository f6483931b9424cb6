"""A device that holds a stage is killed at every token of one answer: always the same tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.lab.struck_answers import StruckAnswers, requests
from tests.lab.struck_household import StruckHousehold, serving

FULL = bool(os.environ.get("PEERLLM_FULL"))
pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600 if FULL else 900)]
NAMES = ("laptop", "mini-pc", "jetson")
TOKENS = 64  # of the longer answers; the last token's loss is of no use to anybody
INDEXES = range(1, TOKENS - 1) if FULL else (1, 40)


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StruckHousehold]:
    with serving(tmp_path_factory.mktemp("every"), None, NAMES, holders=2) as household:
        yield household


@pytest.fixture(scope="module")
def answers(struck: StruckHousehold) -> StruckAnswers:
    return StruckAnswers(struck, requests(TOKENS, ignore_eos=True), least=TOKENS)


@pytest.mark.parametrize("index", INDEXES)
def test_a_device_is_killed_at_token(struck: StruckHousehold, answers: StruckAnswers, index: int) -> None:
    struck.settled()
    host = struck.holders()[0]
    begun = answers.begin(index)
    struck.kill(host)
    answers.check(begun, f"killed at token {index}")
    struck.revive(host)
