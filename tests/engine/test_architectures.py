"""Every family, every cut into two and three: the table of docs/architectures.md comes from the same code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peerllm.engine.families import FAMILIES as SUPPORTED
from tests.engine.architectures import FAMILIES, Example, Family, examine

pytestmark = pytest.mark.usefixtures("calm")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_cut_gives_the_tokens_of_the_whole_model(family: Family, examples: Callable[[str], Example]):
    outcome = examine(examples(family.name))
    assert outcome.passed, outcome
    assert outcome.cuts == 15


def test_what_is_offered_is_what_was_tested():
    assert {family.model_type for family in FAMILIES} == SUPPORTED
    assert len(SUPPORTED) >= 40
