"""Families cut every way into two and three: the table of docs/architectures.md comes from the same code.

By default the families of EVERY_CUT take every cut and the others one into two and one into three; with PEERLLM_FULL=1
all take every cut.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peerllm.engine.families import FAMILIES as SUPPORTED
from tests.engine.architectures import FAMILIES, FULL, LAYERS, Example, every_cut, examine, share

EVERY_CUT = {
    "Llama", "Llama 4 (text)", "Mistral", "Mixtral", "Qwen2", "Qwen2-MoE", "Qwen3", "Qwen3-MoE", "Qwen3-Next",
    "Qwen3.5 (text)", "Gemma", "Gemma 2", "Gemma 3 (text)", "Phi", "Phi-3", "Phi-3.5-MoE", "GPT-2", "GPT-NeoX", "GPT-J",
    "GPT-BigCode", "OPT", "BLOOM", "MPT", "Falcon", "Falcon-H1", "StableLM", "StarCoder2", "Cohere", "Cohere 2", "OLMo",
    "OLMo 2", "OLMo 3", "OLMoE", "Granite", "Granite-MoE", "Granite hybrid", "Bamba", "GLM", "GLM-4", "GLM-4-MoE",
    "SmolLM3", "EXAONE 4", "ERNIE 4.5", "DeepSeek-V2", "DeepSeek-V3", "gpt-oss", "Nemotron", "Nemotron-H", "LFM2",
    "DBRX", "MiniMax-M2", "Seed-OSS",
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("calm")


@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=lambda number: FAMILIES[number].name)
def test_shards_give_the_tokens_of_the_whole_model(number: int, examples: Callable[[str], Example]):
    name = FAMILIES[number].name
    chosen = every_cut() if FULL or name in EVERY_CUT else share(number)
    made = examples(name)
    assert made.layers == LAYERS
    outcome = examine(made, chosen)
    assert outcome.passed, outcome
    assert outcome.cuts == len(chosen)


def test_what_is_offered_is_what_was_tested():
    assert {family.model_type for family in FAMILIES} == SUPPORTED
    assert len(SUPPORTED) >= 40


def test_enough_take_every_cut():
    assert {family.name for family in FAMILIES} >= EVERY_CUT
    assert len({family.model_type for family in FAMILIES if family.name in EVERY_CUT}) >= 44
    assert len(every_cut()) == 15
