"""Families with latent attention (DeepSeek's)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerllm.engine.graph.structure import Routing
from peerllm.engine.graph.table.family import EPS_1E6, RMS, ConfigReader, Family, MixerName, after_dense
from peerllm.engine.graph.table.names import DEEPSEEK

LATENT: Mapping[str, MixerName] = {"full_attention": "latent attention"}
LATENT_DEFAULTS = {
    **EPS_1E6, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "attention_bias": False, "peerllm_kv_apart": False,
}  # fmt: skip
DEEPSEEK_KEYS = {**RMS, "num_experts": "n_routed_experts", "head_dim": ""}


def _deepseek_v2(values: ConfigReader) -> dict[str, Any]:
    groups, used = 1, 1
    if (method := values.get("topk_method")) == "group_limited_greedy":
        groups, used = values.whole("n_group"), values.whole("topk_group")
    elif method != "greedy":
        return {"refused": "another way of choosing experts"}
    scale = values.number("routed_scaling_factor", 1.0)
    return {"values": _shared(values), "routing": Routing("softmax", False, groups, used, scale=scale)}


def _deepseek_v3(values: ConfigReader) -> dict[str, Any]:
    groups, used = values.whole("n_group"), values.whole("topk_group")
    scale = values.number("routed_scaling_factor", 1.0)
    return {
        "values": _shared(values), "routing": Routing("sigmoid", True, groups, used, best=2, eps=1e-20, scale=scale),
        "interleaved": bool(values.get("rope_interleave")),
    }  # fmt: skip


def _shared(values: ConfigReader) -> dict[str, Any]:
    width = values.whole("n_shared_experts") * values.whole("moe_intermediate_size")
    return {"shared_expert_intermediate_size": width}


def _youtu(values: ConfigReader) -> dict[str, Any]:
    return {"interleaved": bool(values.get("rope_interleave"))}


def _minicpm3(values: ConfigReader) -> dict[str, Any]:
    hidden, layers = values.whole("hidden_size"), values.whole("num_hidden_layers")
    depth = values.number("scale_depth", layers**0.5)
    return {
        "values": {
            "residual_multiplier": depth / layers**0.5,
            "logits_scaling": hidden / values.whole("dim_model_base", hidden),
        }
    }


def _glm_lite_sparse(values: ConfigReader, number: int) -> bool:
    kinds = values.get("mlp_layer_types")
    return number > 0 if kinds is None else bool(kinds[number] == "sparse")


LATENT_FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": Family(
        names=DEEPSEEK, mixers=LATENT, interleaved=True, experts="each", by=_deepseek_v2,
        keys={**DEEPSEEK_KEYS, "norm_topk_prob": ""}, sparse=after_dense("first_k_dense_replace"),
        defaults={**LATENT_DEFAULTS, "num_experts": 64, "num_experts_per_tok": None, "moe_intermediate_size": 1407,
            "n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "n_group": None,
            "topk_group": None, "topk_method": "greedy", "norm_topk_prob": False},
    ),
    "deepseek_v3": Family(
        names=DEEPSEEK, mixers=LATENT, experts="each", by=_deepseek_v3, keys=DEEPSEEK_KEYS,
        sparse=after_dense("first_k_dense_replace"),
        defaults={**LATENT_DEFAULTS, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
            "max_position_embeddings": 4096, "n_shared_experts": 1, "first_k_dense_replace": 3,
            "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
            "rope_interleave": True},
    ),
    "glm4_moe_lite": Family(
        names=DEEPSEEK, mixers=LATENT, experts="each", by=_deepseek_v3, keys=DEEPSEEK_KEYS, sparse=_glm_lite_sparse,
        defaults={**LATENT_DEFAULTS, "norm_eps": 1e-5, "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256,
            "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "n_shared_experts": 1,
            "max_position_embeddings": 202752, "mlp_layer_types": None, "routed_scaling_factor": 1.8, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": True, "rope_interleave": True, "partial_rotary_factor": 1.0},
    ),
    "youtu": Family(
        names=DEEPSEEK, mixers=LATENT, by=_youtu, keys={**RMS, "head_dim": ""},
        defaults={**LATENT_DEFAULTS, "tie_word_embeddings": True, "max_position_embeddings": 131072,
            "rope_interleave": True},
    ),
    "minicpm3": Family(
        names=DEEPSEEK, mixers=LATENT, by=_minicpm3, keys={**RMS, "head_dim": "", "embedding_multiplier": "scale_emb"},
        defaults={**LATENT_DEFAULTS, "norm_eps": 1e-5, "kv_lora_rank": 256, "q_lora_rank": 768, "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64, "v_head_dim": None, "tie_word_embeddings": True, "max_position_embeddings": 32768,
            "embedding_multiplier": 12, "scale_depth": 1.4, "dim_model_base": 256},
    ),
}  # fmt: skip
