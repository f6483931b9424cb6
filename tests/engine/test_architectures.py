"""Every family, every cut into two and three: the table of docs/architectures.md comes from the same code."""

from __future__ import annotations

import pytest
import torch

from peerllm.engine.families import FAMILIES as SUPPORTED
from tests.engine.architectures import FAMILIES, Family, examine, quiet


@pytest.fixture(scope="module", autouse=True)
def calm():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    quiet()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_cut_gives_the_tokens_of_the_whole_model(family: Family, tmp_path):
    outcome = examine(family, tmp_path)
    assert outcome.passed, outcome
    assert outcome.cuts == 15


def test_what_is_offered_is_what_was_tested():
    assert {family.model_type for family in FAMILIES} == SUPPORTED
    assert len(SUPPORTED) >= 40
