"""Families with convolutions or recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerllm.engine.graph.structure import Routing
from peerllm.engine.graph.table.family import (
    ATTENTION,
    EPS_1E6,
    GRANITE_DEFAULTS,
    RMS,
    ConfigReader,
    Family,
    MixerName,
    after_dense,
)
from peerllm.engine.graph.table.names import GRANITE_HYBRID, LFM2, LFM2_EXPERTS, QWEN3_NEXT, QWEN35, QWEN35_EXPERTS

LFM2_DEFAULTS = {
    "rope_theta": 1e6, "num_key_value_heads": 8, "tie_word_embeddings": True, "tie_embedding": None,
    "layer_types": None, "conv_L_cache": 3, "max_position_embeddings": 128_000,
}  # fmt: skip
QWEN35_DEFAULTS = {
    **EPS_1E6, "head_dim": 256, "num_key_value_heads": 4, "partial_rotary_factor": 0.25, "layer_types": None,
    "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
DELTA: Mapping[str, MixerName] = {**ATTENTION, "linear_attention": "delta rule"}
QWEN35_MOE_DEFAULTS = {
    **QWEN35_DEFAULTS, "num_key_value_heads": 2, "num_experts_per_tok": 8, "num_experts": 256,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
}  # fmt: skip
MAMBA: Mapping[str, MixerName] = {
    "attention": "attention", "full_attention": "attention", "mamba": "state space", "linear_attention": "state space",
}  # fmt: skip


def _lfm2_layers(values: ConfigReader, number: int) -> str:
    full = values.get("full_attn_idxs")
    return "full_attention" if full is None or number in full else "conv"


def _lfm2(values: ConfigReader) -> dict[str, Any]:
    tied = values.get("tie_embedding", values.get("tie_word_embeddings"))
    width = values.whole("block_ff_dim", values.whole("intermediate_size"))
    if values.get("block_auto_adjust_ff_dim"):
        multiple, factor = values.whole("block_multiple_of"), values.number("block_ffn_dim_multiplier", 1.0)
        width = multiple * -(-int(factor * int(2 * width / 3)) // multiple)
    return {"values": {"intermediate_size": width, "tie_word_embeddings": tied}}


def _lfm2_experts(values: ConfigReader) -> dict[str, Any]:
    routing = Routing(
        "sigmoid", bool(values.get("use_expert_bias")), eps=1e-6, scale=values.number("routed_scaling_factor", 1.0)
    )
    tied = values.get("tie_embedding", values.get("tie_word_embeddings"))
    return {"values": {"tie_word_embeddings": tied}, "routing": routing}


def _silu(values: ConfigReader) -> dict[str, Any]:
    return {} if values.get("hidden_act") == "silu" else {"refused": "convolutions with another activation than silu"}


def _granite_hybrid(values: ConfigReader) -> dict[str, Any]:
    least, most = values.get("time_step_limit", (0.0, float("inf")))
    if values.get("hidden_act") != "silu" or least > 0 or most not in (float("inf"), {"__float__": "Infinity"}):
        return {"refused": "limited time steps, or another activation than silu"}
    if values.get("num_local_experts"):
        return {}
    names = {**GRANITE_HYBRID, "gate up": GRANITE_HYBRID["shared gate up"], "down": GRANITE_HYBRID["shared down"]}
    width = values.whole("shared_expert_intermediate_size")
    return {"names": names, "experts": "", "values": {"intermediate_size": width}}


def _qwen35_layers(values: ConfigReader, number: int) -> str:
    return "linear_attention" if (number + 1) % values.whole("full_attention_interval") else "full_attention"


RECURRENT_FAMILIES: Mapping[str, Family] = {
    "lfm2": Family(
        names=LFM2, keys={}, normed=True, layer_type=_lfm2_layers, by=_lfm2,
        mixers={**ATTENTION, "conv": "convolution"},
        defaults={**LFM2_DEFAULTS, "intermediate_size": 12288, "block_ff_dim": None, "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "full_attn_idxs": None},
    ),
    "qwen3_5_text": Family(
        names=QWEN35, offset=1.0, normed=True, gated_attention=True, layer_type=_qwen35_layers, mixers=DELTA,
        by=_silu, defaults=QWEN35_DEFAULTS,
    ),
    "qwen3_5_moe_text": Family(
        names=QWEN35_EXPERTS, offset=1.0, normed=True, gated_attention=True, layer_type=_qwen35_layers, mixers=DELTA,
        experts="each", keys={**RMS, "intermediate_size": ""}, defaults=QWEN35_MOE_DEFAULTS,
    ),
    "qwen3_next": Family(
        names=QWEN3_NEXT, offset=1.0, normed=True, gated_attention=True, layer_type=_qwen35_layers, mixers=DELTA,
        experts="each", by=_silu,
        defaults={**QWEN35_MOE_DEFAULTS, "num_experts_per_tok": 10, "num_experts": 512, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": ()},
    ),
    "granitemoehybrid": Family(
        names=GRANITE_HYBRID, experts="halves", by=_granite_hybrid, mixers=MAMBA,
        layer_type=lambda values, number: "linear_attention",
        rotates=lambda values, number, kind: values.get("position_embedding_type") == "rope",
        keys={**RMS, "shared_expert_intermediate_size": "shared_intermediate_size"},
        defaults={**EPS_1E6, **GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 1024, "position_embedding_type": None, "layer_types": None,
            "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": "auto", "mamba_d_conv": 4,
            "mamba_expand": 2, "time_step_limit": None},
    ),
    "lfm2_moe": Family(
        names=LFM2_EXPERTS, keys={}, normed=True, mixers={**ATTENTION, "conv": "convolution"}, experts="each",
        by=_lfm2_experts, sparse=after_dense("num_dense_layers"),
        defaults={**LFM2_DEFAULTS, "intermediate_size": 7168, "moe_intermediate_size": 1792, "num_dense_layers": 2,
            "num_experts_per_tok": 4, "num_experts": 32, "use_expert_bias": True, "routed_scaling_factor": 1.0,
            "norm_topk_prob": True},
    ),
}  # fmt: skip
