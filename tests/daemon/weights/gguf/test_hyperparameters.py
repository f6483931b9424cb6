"""What single hyperparameters of GGUF files mean for config.json."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from peerllm.daemon.weights.gguf.architectures import ARCHITECTURES
from peerllm.daemon.weights.gguf.hyperparameters import Hyperparameters
from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError

SIZES = {"block_count": 4, "embedding_length": 64, "attention.head_count": 2, "context_length": 512}
STACK = {f"blk.{number}.ffn_up_exps.weight": TensorAt("", "F32", (4, 24, 64), "/m.gguf", 0, 4) for number in range(4)}


def hyperparameters(architecture: str, values: dict[str, Any], tensors: dict[str, TensorAt] = STACK) -> Hyperparameters:
    metadata = {f"{architecture}.{key}": value for key, value in {**SIZES, **values}.items()}
    return Hyperparameters("m.gguf", {"general.architecture": architecture, **metadata}, tensors)


def more(architecture: str, **values: Any) -> dict[str, Any]:
    """The architecture's own part of config.json."""
    return ARCHITECTURES[architecture].more(hyperparameters(architecture, values))


@pytest.mark.parametrize(("name", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_attention_by_hidden_size_over_heads(name: str, largest: int) -> None:
    values = {"attention.key_length": 16, "attention.sliding_window": 8}
    assert more(name, **values)["query_pre_attn_scalar"] == 16
    assert more(name, **values, block_count=largest)["query_pre_attn_scalar"] == 32


def test_gpt_oss_stretches_without_whole_bounds() -> None:
    values = {"expert_count": 4, "expert_used_count": 2, "attention.sliding_window": 8, "rope.scaling.factor": 4.0}
    assert more("gpt-oss", **values, **{"rope.scaling.type": "yarn"})["rope_scaling"]["truncate"] is False
    assert "truncate" not in more("gpt-oss", **values)["rope_scaling"]


def test_granite_without_a_scale_has_the_usual() -> None:
    assert more("granite")["attention_multiplier"] == 32**-0.5
    assert more("granite", **{"attention.scale": 0.25})["attention_multiplier"] == 0.25


def test_experts_weights_sum_to_one_as_the_file_or_else_the_family_has_it() -> None:
    values = {"expert_count": 4, "expert_used_count": 2}
    assert more("qwen3moe", **values)["norm_topk_prob"] is True
    assert more("qwen2moe", **values)["norm_topk_prob"] is False
    assert more("qwen2moe", **values, expert_weights_norm=True)["norm_topk_prob"] is True


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("granite", {"rope.scaling.finetuned": False}),
        ("glm4", {"rope.dimension_sections": array("i", [16, 24, 24, 0])}),
        ("mistral3", {"attention.temperature_scale": 0.1}),
        ("mistral3", {"rope.scaling.yarn_log_multiplier": 1.0}),
        ("qwen3moe", {"expert_count": 4, "expert_used_count": 2, "expert_weights_scale": 2.5}),
        ("qwen3moe", {"expert_count": 4, "expert_used_count": 2, "block_count": 5}),
    ],
)
def test_what_a_line_does_not_express_is_refused(architecture: str, values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=rf"m\.gguf \(architecture {architecture}\) .*not computed"):
        more(architecture, **values)


def test_one_value_for_all_blocks_is_that_value() -> None:
    assert hyperparameters("llama", {"attention.head_count_kv": array("i", [2] * 4)}).groups == 2
    with pytest.raises(ModelError, match=r"blocks that differ in attention\.head_count_kv"):
        _ = hyperparameters("llama", {"attention.head_count_kv": array("i", [2, 2, 1, 2])}).groups


def test_a_pattern_of_windows_in_the_file_goes_before_the_usual() -> None:
    def kinds(pattern: Any) -> list[str]:
        given = {} if pattern is None else {"attention.sliding_window_pattern": pattern}
        found = hyperparameters("gemma3", {"attention.sliding_window": 8, **given}).windows(2)
        return [kind[0] for kind in found["layer_types"]]

    assert kinds(None) == ["s", "f", "s", "f"]
    assert kinds(3) == ["s", "s", "f", "s"]
    assert kinds(array("B", [0, 1, 1, 1])) == ["f", "s", "s", "s"]
    for bad in (array("B", [1]), "x", 0):
        with pytest.raises(ModelError, match="sliding_window_pattern"):
            kinds(bad)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"block_count": 1 << 39}, "blocks; 1 to 1022 are taken"),
        ({"block_count": 2, "nextn_predict_layers": 2}, "has 0 blocks"),
        ({"attention.key_length": 0}, "heads of width 0"),
        ({"attention.head_count": 1 << 39}, "heads of width"),
    ],
)
def test_counts_are_bounded_before_lists_are_that_long(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        hyperparameters("gemma2", values)
