"""Gemma's families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerllm.engine.graph.table.family import EPS_1E6, PRE, RMS, SANDWICH, WINDOWS, ConfigReader, Family, full_at
from peerllm.engine.graph.table.names import GEMMA2, GEMMA4, VAULTGEMMA

GEMMA_DEFAULTS = {
    **EPS_1E6, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256,
    "num_key_value_heads": 16, "use_bidirectional_attention": None,
}  # fmt: skip
GEMMA2_DEFAULTS = {
    **GEMMA_DEFAULTS, **WINDOWS, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip


def _gemma(values: ConfigReader) -> dict[str, Any]:
    if values.get("use_bidirectional_attention"):
        return {"refused": "attention in both directions"}
    return {"activation": "gelu_pytorch_tanh" if values.get("hidden_act") == "gelu" else None}  # as transformers has it


def _gemma4(values: ConfigReader) -> dict[str, Any]:
    if values.get("enable_moe_block"):
        return {"refused": "experts beside a feed-forward"}
    if values.get("use_bidirectional_attention") not in (None, "vision"):
        return {"refused": "attention in both directions"}
    known: dict[str, Any] = {}
    if (kinds := values.get("layer_types")) is not None:
        known["layer_types"] = [*kinds[:-1], "full_attention"]  # as transformers has it
    placements = (*SANDWICH, "after own input") if values.get("hidden_size_per_layer_input") else SANDWICH
    return {"values": known, "placements": placements}


def _gemma4_layers(values: ConfigReader, number: int) -> str:
    return (
        "full_attention"
        if number in (values.whole("num_hidden_layers") - 1, number // 6 * 6 + 5)
        else ("sliding_attention")
    )


def _gemma4_block(values: ConfigReader, number: int, kind: str) -> dict[str, Any]:
    full, alike = kind == "full_attention", values.get("attention_k_eq_v")
    found: dict[str, Any] = {"keys_as_values": full and alike}
    about = values.get("per_layer_config")
    if about is not None:
        own = {int(key): value for key, value in about.items()}.get(number, {})  # keys such as "05"
        if own.keys() - {"head_dim", "num_key_value_heads"}:
            raise ValueError("layers that differ in more than their heads")
        found |= own
    elif full:
        found["head_dim"] = values.whole("global_head_dim")
        if alike and (groups := values.get("num_global_key_value_heads")) is not None:
            found["num_key_value_heads"] = groups
    count, kinds = values.whole("num_hidden_layers"), values.get("layer_types")
    shared = count - values.get("num_kv_shared_layers")
    if number >= shared:
        known = kinds or [_gemma4_layers(values, one) for one in range(count)]
        found["maker"] = max(one for one in range(shared) if known[one] == kind)
        if values.get("use_double_wide_mlp"):
            found["intermediate_size"] = 2 * values.whole("intermediate_size")
    return found


def _gemma2(**more: Any) -> Family:
    about: dict[str, Any] = {
        "names": GEMMA2, "keys": {**RMS, "hidden_act": "hidden_activation"}, "defaults": GEMMA2_DEFAULTS, "by": _gemma,
        "offset": 1.0, "scaled_embedding": True, "placements": SANDWICH, "layer_type": full_at(1, 2),
    }  # fmt: skip
    return Family(**{**about, **more})


GEMMA_FAMILIES: Mapping[str, Family] = {
    "gemma": Family(offset=1.0, scaled_embedding=True, defaults=GEMMA_DEFAULTS, by=_gemma),
    "gemma2": _gemma2(),
    "vaultgemma": _gemma2(names=VAULTGEMMA, placements=PRE),
    "gemma3_text": _gemma2(
        normed=True, layer_type=full_at(-1, 6, "sliding_window_pattern"), local_theta=10000.0,
        defaults={**GEMMA2_DEFAULTS, "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1e6,
            "sliding_window_pattern": 6, "rope_local_base_freq": None},
    ),
    "gemma4_text": _gemma2(
        names=GEMMA4, offset=0.0, normed=True, value_norm=True, layer_type=_gemma4_layers, local_theta=10000.0,
        own_input="hidden_size_per_layer_input", scaled_blocks=True, by=_gemma4, by_block=_gemma4_block,
        keys={**RMS, "hidden_act": "hidden_activation", "attention_multiplier": "", "rope_scaling": ""},
        defaults={**GEMMA2_DEFAULTS, "query_pre_attn_scalar": None, "attn_logit_softcapping": None,
            "final_logit_softcapping": None, "attention_multiplier": 1.0, "max_position_embeddings": 131072,
            "sliding_window": 512, "global_head_dim": 512, "num_global_key_value_heads": None,
            "attention_k_eq_v": False, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144,
            "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "enable_moe_block": False,
            "per_layer_config": None, "rope_parameters": {"full_attention": {"rope_type": "proportional",
            "partial_rotary_factor": 0.25, "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 10000.0}}},
    ),
}  # fmt: skip
