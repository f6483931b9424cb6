"""Families of GPT-2's time: learned positions, matrices with biases, several layouts of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from peerllm.engine.graph.table.family import HEADS_ALONE, LAYER, ONE, PRE, ConfigReader, Family, unrotated
from peerllm.engine.graph.table.names import FALCON, GPT2, GPT_NEO, GPTJ, NEOX, OPT

GPT2_KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon", **HEADS_ALONE,
}  # fmt: skip


def _neo_windows(values: ConfigReader, number: int) -> str:
    types = values.get("attention_types")
    kinds = (kind for some, times in types if some for _ in range(times) for kind in some)  # `times` may be huge
    return {"global": "full_attention", "local": "sliding_attention"}[next(islice(kinds, number, None), "")]


def _falcon(values: ConfigReader) -> dict[str, Any]:
    if values.get("alibi"):
        return {"refused": "positions by alibi"}
    if values.get("new_decoder_architecture"):
        if values.get("num_ln_in_parallel_attn", 2) == 1:
            return {"placements": ONE}
        return {"names": {**FALCON, "before attention": "ln_attn", "before mlp": "ln_mlp"}}
    groups = 1 if values.get("multi_query") else values.whole("num_attention_heads")
    return {"groups": groups, "placements": ONE if values.get("use_parallel_residual") else PRE}


def _opt(values: ConfigReader) -> dict[str, Any]:
    before, affine = values.get("do_layer_norm_before"), values.get("layer_norm_elementwise_affine")
    width = values.get("word_embed_proj_dim", values.get("hidden_size"))
    usual = before and affine and not values.get("_remove_final_layer_norm") and width == values.get("hidden_size")
    return {} if usual else {"refused": "the layout of opt-350m"}


def _gpt2(**more: Any) -> Family:
    about: dict[str, Any] = {
        "names": GPT2, "keys": GPT2_KEYS, "layers": "h", "norm": "layer", "gated": False, "rotates": unrotated,
        "defaults": {
            "hidden_act": "gelu_new", "tie_word_embeddings": True, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
    }  # fmt: skip
    return Family(**{**about, **more})


OLDER_FAMILIES: Mapping[str, Family] = {
    "gpt2": _gpt2(turned=True),
    "gpt_bigcode": _gpt2(
        merged="by group",
        defaults={"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "scale_attn_weights": True,
        "multi_query": True}, by=lambda values: {"groups": 1 if values.get("multi_query") else None},
    ),
    "gpt_neo": _gpt2(
        names=GPT_NEO, layer_type=_neo_windows,
        keys={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "sliding_window": "window_size",
            "hidden_act": "activation_function", "norm_eps": "layer_norm_epsilon", "attention_multiplier": "",
            **HEADS_ALONE},
        defaults={"hidden_act": "gelu_new", "tie_word_embeddings": True, "attention_multiplier": 1.0,
            "sliding_window": 256, "attention_types": [[["global", "local"], 12]]},
    ),
    "gptj": _gpt2(
        names=GPTJ, placements=ONE, parallel=True, interleaved=True, rotates=lambda values, number, kind: True,
        keys={**GPT2_KEYS, "rope_theta": "", "rope_parameters": "", "rope_scaling": ""},
        defaults={"hidden_act": "gelu_new", "rotary_dim": 64},
    ),
    "opt": Family(
        names=OPT, norm="layer", gated=False, rotates=unrotated, position_offset=2, by=_opt,
        keys={"norm_eps": "", "intermediate_size": "ffn_dim", "hidden_act": "activation_function", **HEADS_ALONE},
        defaults={"hidden_act": "relu", "tie_word_embeddings": True, "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False, "word_embed_proj_dim": None},
    ),
    "gpt_neox": Family(
        names=NEOX, norm="layer", gated=False, merged="by group",
        keys={**LAYER, **HEADS_ALONE, "partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
        defaults={"hidden_act": "gelu", "partial_rotary_factor": 0.25, "use_parallel_residual": True},
    ),
    "falcon": Family(
        names=FALCON, layers="h", norm="layer", gated=False, merged="by group", by=_falcon,
        keys={"norm_eps": "layer_norm_epsilon", "num_key_value_heads": "num_kv_heads", "head_dim": "",
            "intermediate_size": "ffn_hidden_size", "hidden_act": "activation",
            "use_parallel_residual": "parallel_attn"},
        defaults={"hidden_act": "gelu", "tie_word_embeddings": True, "alibi": False, "multi_query": True,
            "new_decoder_architecture": False, "num_ln_in_parallel_attn": None, "use_parallel_residual": True},
    ),
}  # fmt: skip
