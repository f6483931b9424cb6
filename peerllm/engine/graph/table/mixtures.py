"""Families of mixtures of experts with plain attention."""

from __future__ import annotations

from collections.abc import Mapping

from peerllm.engine.graph.table.family import (
    EPS_1E6,
    GRANITE_DEFAULTS,
    POST,
    QWEN_WINDOWS,
    RMS,
    WINDOWS,
    ConfigReader,
    Family,
    full_at,
    qwen_windows,
    windows,
)
from peerllm.engine.graph.table.names import FLEX_OLMO, GPT_OSS, GRANITE_EXPERTS, MIXTRAL, QWEN_EXPERTS

QWEN_MOE = {
    "num_experts_per_tok": 4, "num_experts": 60, "num_local_experts": None, "moe_intermediate_size": 1408,
    "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": (),
}  # fmt: skip


def _qwen2_moe_windows(values: ConfigReader, number: int) -> str:
    slides = values.get("use_sliding_window") and number % 2 == 0 and number < values.get("max_window_layers")
    return "sliding_attention" if slides else "full_attention"


MIXTURES_FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(
        names=MIXTRAL, layer_type=windows, experts="each",
        defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8,
            "num_experts_per_tok": 2},
    ),
    "qwen2_moe": Family(
        names=QWEN_EXPERTS, layer_type=_qwen2_moe_windows, experts="each",
        defaults={**EPS_1E6, **QWEN_WINDOWS, **QWEN_MOE, "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": Family(
        names=QWEN_EXPERTS, layer_type=qwen_windows, experts="each", normed=True,
        defaults={**EPS_1E6, **QWEN_MOE, "num_key_value_heads": 4, "sliding_window": 4096, "use_sliding_window": False,
            "num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768},
    ),
    "olmoe": Family(
        names=QWEN_EXPERTS, normed=True, norm_over="heads", experts="each",
        defaults={"num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False, "clip_qkv": None},
        by=lambda values: {"refused": "queries and keys cut off after their norm"} if values.get("clip_qkv") else {},
    ),
    "flex_olmo": Family(
        names=FLEX_OLMO, placements=POST, normed=True, norm_over="heads", experts="each",
        defaults={**EPS_1E6, "rope_theta": 500000.0, "num_experts_per_tok": 5, "num_experts": 7,
            "norm_topk_prob": False},
    ),
    "granitemoe": Family(
        names=GRANITE_EXPERTS, experts="halves",
        defaults={**EPS_1E6, **GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "granitemoeshared": Family(
        names=GRANITE_EXPERTS, experts="halves",
        keys={**RMS, "shared_expert_intermediate_size": "shared_intermediate_size"},
        defaults={**EPS_1E6, **GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 0},
    ),
    "gpt_oss": Family(
        names=GPT_OSS, experts="interleaved", sinks=True, layer_type=full_at(1, 2),
        defaults={**WINDOWS, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0,
            "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
            "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096}},
    ),
}  # fmt: skip
