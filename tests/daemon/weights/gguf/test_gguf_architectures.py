"""Every architecture of the table: a GGUF file of a tiny model computes what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from peerllm.daemon.weights.gguf.architectures import ARCHITECTURES
from peerllm.daemon.weights.gguf.model_directory import model_directory
from peerllm.engine.graph.describe import describe
from peerllm.engine.weights.checkpoint import read_tensors
from tests.daemon.weights.gguf.gguf_models import ARCHES, write_gguf
from tests.engine.conftest import calm  # noqa: F401 (a fixture)
from tests.engine.graph.variants import (
    CONTEXT,
    DELTA,
    DELTA_ALONE,
    EXPERTS,
    GRANITE,
    HALF_ROTATED,
    LINEAR,
    LLAMA3,
    MAMBA,
    MLA,
    MLA_EVEN,
    ROUTED,
    YARN,
    load,
    model_of,
)
from tests.engine.runs import in_slot

TOLERANCE = 1e-4  # of the largest logit
LENGTH = 100
FEW = {"num_hidden_layers": 2}
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
WIDER = {**SHAPE, "head_dim": 24}
EACH = {**SHAPE, "num_key_value_heads": 4}  # heads that share nothing
WINDOW = {"sliding_window": 21}
FEW_TYPES = {"layer_types": ["linear_attention", "full_attention"]}
LONG = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * one for one in range(8)], "long_factor": [1.0 + 0.7 * one for one in range(8)],
    },
    "original_max_position_embeddings": 64,
}  # fmt: skip
LOCAL = {
    "rope_parameters": {
        "full_attention": YARN["rope_parameters"], "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
}  # fmt: skip
GEMMA4 = {
    "num_hidden_layers": 6, "num_kv_shared_layers": 2, "global_head_dim": 32, "vocab_size_per_layer_input": 70,
    "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
# Of each model type the first is what every run checks. What a file cannot say (a window of Mistral's, a scale of one
# family's attention) is not varied.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": (
        {**WIDER, **LLAMA3, "attention_bias": True, "mlp_bias": True}, {**LINEAR, "tie_word_embeddings": True}, YARN,
    ),
    "mixtral": (EXPERTS,),
    "qwen2": ({}, WIDER),
    "qwen2_moe": ({**EXPERTS, "shared_expert_intermediate_size": 40},),
    "qwen3": (WIDER, {"attention_bias": True, **YARN}),
    "qwen3_moe": ({**EXPERTS, "norm_topk_prob": True},),
    "gemma": (WIDER,),
    "gemma2": ({**WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},),
    "gemma3_text": (
        {**WINDOW, **LOCAL, "query_pre_attn_scalar": 16, "num_hidden_layers": 7, "final_logit_softcapping": 3.0},
        {**WINDOW, "query_pre_attn_scalar": 16},
    ),
    "gemma4_text": (
        {**GEMMA4, **WINDOW, "hidden_size_per_layer_input": 32, "use_double_wide_mlp": True},
        {
            **WINDOW, "hidden_size_per_layer_input": 0, "num_hidden_layers": 3, "attention_k_eq_v": True,
            "num_global_key_value_heads": 1, "global_head_dim": 40,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi": ({**EACH, "intermediate_size": 256},),
    "phi3": ({**WINDOW, "max_position_embeddings": 4096, **LONG}, LONG, {}),
    "granite": (GRANITE, {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "granitemoe": ({**GRANITE, **EXPERTS},),
    "granitemoeshared": ({**GRANITE, **EXPERTS, "shared_intermediate_size": 24},),
    "olmo": ({"clip_qkv": 1.0}, {}),
    "olmo2": ({},),
    "olmo3": ({**WINDOW, **LOCAL, "num_hidden_layers": 4}, {**WINDOW, "layer_types": ["sliding_attention"] * 2}),
    "olmoe": (EXPERTS,),
    "starcoder2": ({**LINEAR, "sliding_window": None}, {"use_bias": False, "sliding_window": None}),
    "gpt_oss": ({**EXPERTS, **WINDOW, "intermediate_size": 24}, {**EXPERTS, **WINDOW, **WIDER}),
    "stablelm": (
        {"use_qkv_bias": True, "qk_layernorm": True}, {"use_parallel_residual": True}, {"qk_layernorm": False},
    ),
    "cohere": ({"use_qk_norm": True, "logit_scale": 2.0}, {}),
    "cohere2": ({**WINDOW, "logit_scale": 1.5, "num_hidden_layers": 5},),
    "glm": ({"attention_bias": True},),
    "glm4": ({"attention_bias": True}, {"attention_bias": False, **LINEAR}),
    "falcon": (
        {"multi_query": True, "num_kv_heads": 1},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 2},
    ),
    "gpt2": ({}, {"n_inner": 56}),
    "gpt_bigcode": ({},),
    "gpt_neox": ({}, {"use_parallel_residual": False, "attention_bias": False, **LINEAR}),
    "nemotron": ({"attention_bias": True, "mlp_bias": True}, {}),
    "exaone4": (
        {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "smollm3": ({"num_hidden_layers": 4},),
    "arcee": ({"mlp_bias": True, **YARN}, {}),
    "ernie4_5": ({"use_bias": True, **WIDER}, {}),
    "seed_oss": ({"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}, {}),
    "hunyuan_v1_dense": ({},),
    "lfm2": (
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 4, "block_multiple_of": 16},
        {"layer_types": ["full_attention", "conv"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe": (
        {
            **EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "granitemoehybrid": (
        {
            **GRANITE, **MAMBA, "layer_types": ["mamba", "attention"], "mamba_n_groups": 2, "num_local_experts": 0,
            "shared_intermediate_size": 24, "position_embedding_type": "rope",
        },
        {**GRANITE, **EXPERTS, **MAMBA, "layer_types": ["attention", "mamba"], "shared_intermediate_size": 24},
    ),
    "deepseek_v2": (
        {**ROUTED, **MLA, "routed_scaling_factor": 1.7},
        {**ROUTED, **MLA_EVEN, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    ),
    "deepseek_v3": (
        {
            **ROUTED, **MLA, "n_group": 3, "topk_group": 1,
            "rope_parameters": {**YARN["rope_parameters"], "mscale": 0.7, "mscale_all_dim": 0.7},
        },
        {**ROUTED, **MLA_EVEN, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "youtu": (MLA,),
    "qwen3_5_text": ({**DELTA, **FEW_TYPES}, {**DELTA_ALONE, **FEW_TYPES, **HALF_ROTATED}),
    "qwen3_5_moe_text": ({**DELTA, **FEW_TYPES, **EXPERTS, "shared_expert_intermediate_size": 40},),
}  # fmt: skip
# Architectures of other names for what the family computes with text alone.
ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral3": ("llama", {}), "internlm2": ("llama", {}), "exaone": ("llama", {"paired": False}),
    "qwen2vl": ("qwen2", {}), "qwen3vl": ("qwen3", {}), "qwen3vlmoe": ("qwen3_moe", {}),
}  # fmt: skip
CASES = [
    pytest.param(kind, values, id=f"{kind}-{number}", marks=[] if number == 0 else [pytest.mark.slow])
    for kind, variants in VARIANTS.items()
    for number, values in enumerate(variants)
]


pytestmark = pytest.mark.usefixtures("calm")


def made(kind: str, values: dict[str, Any]) -> Any:
    shape = {key: value for key, value in SHAPE.items() if kind != "falcon" or key != "head_dim"}
    if "kv_lora_rank" in values:
        shape = {key: value for key, value in shape.items() if key not in ("head_dim", "num_key_value_heads")}
    return model_of(kind, 3, {**FEW, **shape, **values})


def logits(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(ids[None])).logits[0].numpy()


def computed(path: Path, ids: Any) -> tuple[Any, dict[str, Any]]:
    """Logits behind the last token, from the file's model directory; and its config.json."""
    directory = model_directory([path], path.parent / "cache")
    config = json.loads((directory / "config.json").read_text())
    described = describe(config)
    shard = load(described, directory, 0, len(described.model.units) + 1)
    shard.forward(ids[:-1], [in_slot(0, 0, len(ids) - 1)])
    return shard.forward(ids[-1:], [in_slot(0, len(ids) - 1, 1, True)])[0], config


@pytest.mark.parametrize(("kind", "values"), CASES)
def test_logits_equal_those_of_transformers(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    model = made(kind, values)
    write_gguf(model, tmp_path / "m.gguf")
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, LENGTH)
    wanted = logits(model, ids)
    got, config = computed(tmp_path / "m.gguf", ids)
    assert config["model_type"] == kind
    assert np.abs(got - wanted[-1]).max() <= TOLERANCE * np.abs(wanted).max()


def test_every_architecture_has_a_variant() -> None:
    tested = {gguf.MODEL_ARCH_NAMES[ARCHES[kind]] for kind in VARIANTS}
    assert tested | ALIKE.keys() == set(ARCHITECTURES)
    assert CONTEXT > LENGTH > 64  # of LONG's: further divisors are used


@pytest.mark.parametrize("name", ALIKE)
def test_files_that_differ_in_their_architectures_name_alone_are_alike(name: str, tmp_path: Path) -> None:
    kind, changes = ALIKE[name]
    model = made(kind, {**VARIANTS[kind][0], **LLAMA3} if kind == "llama" else VARIANTS[kind][0])
    write_gguf(model, tmp_path / "m.gguf")
    write_gguf(model, tmp_path / "n.gguf", name=name)
    one, other = (model_directory([tmp_path / file], tmp_path / "cache") for file in ("m.gguf", "n.gguf"))
    config = json.loads((one / "config.json").read_text())
    config["quantization_config"] |= changes
    assert json.loads((other / "config.json").read_text()) == config
    assert read_tensors(one).keys() == read_tensors(other).keys()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma4_text", "gpt2", "qwen3_moe"])
def test_coded_matrices_are_those_that_the_file_holds(kind: str, tmp_path: Path) -> None:
    """Q8_0, dequantised by the gguf library into the model that transformers computes."""
    model = made(kind, {**VARIANTS[kind][0], "intermediate_size": 64, "moe_intermediate_size": 32})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            turned = "c_" in name and tensor.dim() == 2
            matrix = tensor.T if turned else tensor
            if tensor.dim() > 1 and matrix.shape[-1] % 32 == 0 and "gate.weight" not in name and "wpe" not in name:
                raw = gguf.quants.quantize(matrix.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
                read = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
                tensor.copy_(read.T if turned else read)
    write_gguf(model, tmp_path / "m.gguf", quantised=True)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, LENGTH)
    wanted = logits(model, ids)
    got, config = computed(tmp_path / "m.gguf", ids)
    assert "Q8_0" in config["quantization_config"]["types"].values()
    assert np.abs(got - wanted[-1]).max() <= TOLERANCE * np.abs(wanted).max()
