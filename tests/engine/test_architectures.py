"""Families cut into two and three shards: the table of docs/architectures.md comes from the same code.

By default each takes one cut into two and one into three; the tests marked `slow` take every cut.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peerllm.engine.families import FAMILIES as SUPPORTED
from peerllm.engine.graph.table import FAMILIES as GRAPH
from peerllm.wrapped_models import WRAPPERS
from tests.engine.architectures import FAMILIES, LAYERS, Cut, Example, Family, every_cut, examine, share

THROUGH_TORCH_TOO = 4  # by default every such one of the graph engine's families
MUST_BE_GRAPHS = {
    "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "starcoder2", "stablelm", "cohere", "cohere2",
    "olmo", "olmo2", "olmo3", "granite", "glm4", "smollm3", "exaone4", "gpt_oss", "ernie4_5", "seed_oss",
    "hunyuan_v1_dense",
}  # fmt: skip
LAYOUTS = {"OPT (350m layout)", "Falcon (ALiBi)", "Gemma 4 (experts)"}  # which the graph engine leaves to torch

OFTEN = {  # of the quantized variants, those that are not marked slow
    "Llama: GPTQ 4 bits, in order of activations", "Qwen2: GPTQ 4 bits, zeros", "Gemma 3: compressed-tensors 4 bits",
    "Qwen3-MoE: compressed-tensors FP8", "Mixtral: AWQ", "gpt-oss: MXFP4",
}  # fmt: skip
# What these add to others (other names of tensors) is tested by itself, or takes long: they are marked slow.
SELDOM = {
    "Mistral 3 (Ministral)", "LLaVA", "LLaVA-NeXT", "SmolVLM", "Idefics 3", "InternVL", "Qwen2-VL", "Qwen3-VL",
    "Qwen3.5-MoE", "Llama 4", "Gemma 4 (unified)", "Gemma 4 (dense)", "Gemma 4 (experts)", "Gemma 3n (text)",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("calm")


def seldom(family: Family) -> bool:
    return family.name in SELDOM or (bool(family.quantised) and family.name not in OFTEN)


every_family = pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=one.name, marks=pytest.mark.slow if seldom(one) else ())
        for number, one in enumerate(FAMILIES)
    ],
)


def passes(number: int, examples: Callable[[str], Example], chosen: list[Cut], torch_too: Cut | None) -> None:
    family = FAMILIES[number]
    made = examples(family.name)
    assert made.layers == LAYERS
    outcome = examine(made, chosen, torch_too)
    assert outcome.passed, outcome
    assert outcome.cuts == len(chosen)
    assert (outcome.by == "graph") == (made.inspected.architecture in GRAPH and family.name not in LAYOUTS)


@every_family
def test_shards_give_the_tokens_of_the_whole_model(number: int, examples: Callable[[str], Example]) -> None:
    chosen = share(number)
    passes(number, examples, chosen, None if number % THROUGH_TORCH_TOO else chosen[1])


@pytest.mark.slow
@every_family
def test_so_does_every_cut(number: int, examples: Callable[[str], Example]) -> None:
    passes(number, examples, every_cut(), share(number)[1])


def test_what_is_offered_is_what_was_tested() -> None:
    assert {family.model_type for family in FAMILIES if family.beside is None} == SUPPORTED
    assert {family.model_type for family in FAMILIES if family.beside is not None} == set(WRAPPERS)
    assert len(SUPPORTED) >= 40
    assert MUST_BE_GRAPHS <= set(GRAPH) <= SUPPORTED
    assert len(every_cut()) == 15
