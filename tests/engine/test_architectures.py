"""Families cut into two and three shards: the table of docs/architectures.md comes from the same code.

By default every third takes one cut into two and one into three; the tests marked `slow` take every cut of each.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peerllm.engine.families import FAMILIES as SUPPORTED
from peerllm.engine.graph.table import FAMILIES as GRAPH
from peerllm.wrapped_models import WRAPPERS
from tests.engine.architectures import FAMILIES, LAYERS, Cut, Example, every_cut, examine, share

THIRD = 3  # what one family's tokens depend on is shown by test_families.py, and for torch's by the tests marked slow
THROUGH_TORCH_TOO = 4  # by default every such one of the graph engine's families
MUST_BE_GRAPHS = {
    "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "starcoder2", "stablelm", "cohere", "cohere2",
    "olmo", "olmo2", "olmo3", "granite", "glm4", "smollm3", "exaone4", "gpt_oss", "ernie4_5", "seed_oss",
    "hunyuan_v1_dense",
}  # fmt: skip
LAYOUTS = {"OPT (350m layout)", "Falcon (ALiBi)", "Gemma 4 (experts)"}  # which the graph engine leaves to torch

pytestmark = pytest.mark.usefixtures("calm")


def families(every: int = 1) -> pytest.MarkDecorator:
    numbers = range(0, len(FAMILIES), every)
    return pytest.mark.parametrize("number", numbers, ids=[FAMILIES[number].name for number in numbers])


def passes(number: int, examples: Callable[[str], Example], chosen: list[Cut], torch_too: Cut | None) -> None:
    family = FAMILIES[number]
    made = examples(family.name)
    assert made.layers == LAYERS
    outcome = examine(made, chosen, torch_too)
    assert outcome.passed, outcome
    assert outcome.cuts == len(chosen)
    assert (outcome.by == "graph") == (made.inspected.architecture in GRAPH and family.name not in LAYOUTS)


@families(THIRD)
def test_shards_give_the_tokens_of_the_whole_model(number: int, examples: Callable[[str], Example]) -> None:
    chosen = share(number)
    passes(number, examples, chosen, None if number % THROUGH_TORCH_TOO else chosen[1])


@pytest.mark.slow
@families()
def test_so_does_every_cut(number: int, examples: Callable[[str], Example]) -> None:
    passes(number, examples, every_cut(), share(number)[1])


def test_what_is_offered_is_what_was_tested() -> None:
    assert {family.model_type for family in FAMILIES if family.beside is None} == SUPPORTED
    assert {family.model_type for family in FAMILIES if family.beside is not None} == set(WRAPPERS)
    assert len(SUPPORTED) >= 40
    assert MUST_BE_GRAPHS <= set(GRAPH) <= SUPPORTED
    assert len(every_cut()) == 15
