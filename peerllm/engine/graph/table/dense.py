"""Families of dense models with rotated positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerllm.engine.graph.table.family import (
    EPS_1E6,
    GRANITE_DEFAULTS,
    HEADS_ALONE,
    LAYER,
    ONE,
    POST,
    PRE,
    QWEN_WINDOWS,
    RMS,
    SANDWICH,
    WINDOWS,
    ConfigReader,
    Family,
    full_at,
    in_windows,
    qwen_windows,
    windows,
)
from peerllm.engine.graph.table.names import (
    GLM,
    GLM4,
    HUNYUAN,
    HYPERCLOVAX,
    PERSIMMON,
    PHI,
    PHI3,
    POSTED,
    STABLELM,
    STARCODER2,
)


def _smollm3_windows(values: ConfigReader, number: int) -> str:
    slides = values.get("use_sliding_window") and not _smollm3_rotates(values, number, "")
    return windows(values, number) if slides else "full_attention"


def _smollm3_rotates(values: ConfigReader, number: int, kind: str) -> bool:
    rotated = values.get("no_rope_layers")
    return bool((number + 1) % values.get("no_rope_layer_interval") if rotated is None else rotated[number])


def _phi3(values: ConfigReader) -> dict[str, Any]:
    about = values.get("rope_scaling", values.get("rope_parameters", {}))
    longer = "short_factor" in about  # transformers treats this as longrope, whatever its name
    return {"refused": "rotary embeddings that follow the length of a sequence"} if longer else {}


def _granite_swa(values: ConfigReader) -> dict[str, Any]:
    about = values.get("rope_parameters", {})
    usual = about.get("rope_theta", values.get("rope_theta"))
    other = any(theta != usual for theta in values.get("layer_rope_theta", ()))
    return {"refused": "layers with rotations of their own"} if other else {}


DENSE_FAMILIES: Mapping[str, Family] = {
    "llama": Family(defaults=EPS_1E6),
    "mistral": Family(layer_type=windows, defaults={**EPS_1E6, "sliding_window": 4096, "num_key_value_heads": 8}),
    "ministral": Family(layer_type=windows, defaults={**EPS_1E6, **WINDOWS, "num_key_value_heads": 8}),
    "qwen2": Family(layer_type=qwen_windows, defaults={**EPS_1E6, **QWEN_WINDOWS, "num_key_value_heads": 32}),
    "qwen3": Family(
        layer_type=qwen_windows, normed=True,
        defaults={**EPS_1E6, **QWEN_WINDOWS, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "phi": Family(
        names=PHI, keys=LAYER, norm="layer", head_norm="layer", placements=ONE, parallel=True, gated=False,
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "qk_layernorm": False},
    ),
    "phi3": Family(
        names=PHI3, layer_type=windows, defaults={"partial_rotary_factor": 1.0, "sliding_window": None}, by=_phi3,
    ),
    "persimmon": Family(
        names=PERSIMMON, keys={**LAYER, **HEADS_ALONE}, norm="layer", head_norm="layer", gated=False, merged="by group",
        defaults={"hidden_act": "relu2", "partial_rotary_factor": 0.5, "qk_layernorm": True},
    ),
    "stablelm": Family(
        names=STABLELM, keys={**LAYER, "head_dim": ""}, norm="layer", head_norm="layer", norm_over="each",
        defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25, "qk_layernorm": False,
            "use_parallel_residual": False},
        by=lambda values: {"placements": ONE} if values.get("use_parallel_residual") else {},
    ),
    "starcoder2": Family(
        names=STARCODER2, keys={"norm_eps": "norm_epsilon"}, norm="layer", gated=False, layer_type=windows,
        defaults={"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "num_key_value_heads": 2,
            "sliding_window": None},
    ),
    "cohere": Family(
        keys={**LAYER, "qk_layernorm": "use_qk_norm"}, norm="layer", head_norm="layer", norm_over="each",
        placements=ONE, parallel=True, interleaved=True,
        defaults={"tie_word_embeddings": True, "rope_theta": 500000.0, "logit_scale": 0.0625, "qk_layernorm": False},
    ),
    "cohere2": Family(
        keys={**LAYER, "head_dim": ""}, norm="layer", placements=ONE, parallel=True, interleaved=True,
        layer_type=full_at(-1, 4, "sliding_window_pattern"), rotates=in_windows,
        defaults={**WINDOWS, "tie_word_embeddings": True, "logit_scale": 0.0625, "sliding_window_pattern": 4},
    ),
    "olmo": Family(keys={"norm_eps": ""}, norm="layer", weighted=False, defaults={"clip_qkv": None}),
    "olmo2": Family(names=POSTED, placements=POST, normed=True, norm_over="heads"),
    "olmo3": Family(
        names=POSTED, placements=POST, normed=True, norm_over="heads", layer_type=full_at(-1, 4), local_theta=500000.0,
        defaults={**WINDOWS, "rope_theta": 500000.0},
    ),
    "granite": Family(defaults={**EPS_1E6, **GRANITE_DEFAULTS}),
    "granite_swa": Family(
        layer_type=full_at(0, 4), sinks=True, by=_granite_swa,
        defaults={**GRANITE_DEFAULTS, **WINDOWS, "num_key_value_heads": 4, "sliding_window": 128,
            "tie_word_embeddings": True, "layer_rope_theta": None},
    ),
    "glm": Family(
        names=GLM, interleaved=True,
        defaults={"norm_eps": 1.5625e-07, "num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    "glm4": Family(
        names=GLM4, interleaved=True, placements=SANDWICH,
        defaults={"norm_eps": 1.5625e-07, "num_key_value_heads": 2, "head_dim": 128, "partial_rotary_factor": 0.5},
    ),
    "smollm3": Family(
        layer_type=_smollm3_windows, rotates=_smollm3_rotates,
        defaults={**EPS_1E6, **WINDOWS, "tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 2e6,
            "sliding_window": None, "use_sliding_window": False, "no_rope_layers": None, "no_rope_layer_interval": 4},
    ),
    "exaone4": Family(
        names=POSTED, placements=POST, normed=True, layer_type=full_at(-1, 4, "sliding_window_pattern"),
        rotates=lambda values, number, kind: values.get("sliding_window") is None or kind == "sliding_attention",
        defaults={**WINDOWS, "num_key_value_heads": 32, "sliding_window_pattern": 4},
    ),
    "ernie4_5": Family(
        interleaved=True,
        defaults={"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True, "rope_theta": 500000.0},
    ),
    "seed_oss": Family(defaults={**EPS_1E6, "num_key_value_heads": 8, "head_dim": 128}),
    "hunyuan_v1_dense": Family(names=HUNYUAN, normed=True, norm_after_rope=True, alpha=True),
    "arcee": Family(gated=False, defaults={"hidden_act": "relu2"}),
    "helium": Family(
        interleaved=True,
        defaults={"norm_eps": 1e-8, "num_key_value_heads": 20, "head_dim": 128, "rope_theta": 100000.0},
    ),
    "nemotron": Family(
        keys={}, norm="layer", offset=1.0, gated=False, defaults={"hidden_act": "relu2", "partial_rotary_factor": 0.5},
    ),
    "jais2": Family(keys=LAYER, norm="layer", gated=False, defaults={"hidden_act": "relu2"}),
    "cwm": Family(
        layer_type=full_at(0, 4),
        defaults={**WINDOWS, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192, "rope_theta": 1e6,
            "rope_parameters": {"rope_type": "llama3", "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_theta": 1e6}},
    ),
    "internlm3": Family(defaults={"num_key_value_heads": 2, "head_dim": 128}),
    "iquestcoder": Family(defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "hyperclovax": Family(
        names=HYPERCLOVAX, keys={**RMS, "logit_scale": "logits_scaling"},
        defaults={**EPS_1E6, "embedding_multiplier": 1.0, "logit_scale": 1.0, "residual_multiplier": 1.0,
            "attention_multiplier": None, "use_post_norm": True},
        by=lambda values: {"placements": SANDWICH if values.get("use_post_norm") else PRE},
    ),
}  # fmt: skip
