"""The families that the graph engine computes: a line or two each, verified by the architecture test.

A line says what differs from Llama: names of tensors, keys of config.json, values it may leave out, norms, rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from peerllm.engine.graph.model import Experts, Placement


class Asked(Protocol):
    """See describe.Values."""

    def get(self, name: str, default: Any = None) -> Any: ...
    def whole(self, name: str, default: int | None = None) -> int: ...


Norms = tuple[Placement, ...]
PRE: Norms = ("before attention", "before mlp")
POST: Norms = ("after attention", "after mlp")
SANDWICH: Norms = ("before attention", "after attention", "before mlp", "after mlp")
LLAMA: Mapping[str, str] = {
    "embedding": "embed_tokens", "final": "norm", "output": "lm_head",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "queries": "self_attn.q_norm", "keys": "self_attn.k_norm", "sinks": "self_attn.sinks",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "before attention": "input_layernorm", "before mlp": "post_attention_layernorm",
}  # fmt: skip
GEMMA2 = {
    **LLAMA, "after attention": "post_attention_layernorm", "before mlp": "pre_feedforward_layernorm",
    "after mlp": "post_feedforward_layernorm",
}  # fmt: skip
POSTED = {**LLAMA, "after attention": "post_attention_layernorm", "after mlp": "post_feedforward_layernorm"}
QWEN_EXPERTS = {
    **LLAMA, "router": "mlp.gate", "expert gate": "mlp.experts.{}.gate_proj", "expert up": "mlp.experts.{}.up_proj",
    "expert down": "mlp.experts.{}.down_proj", "shared gate": "mlp.shared_expert.gate_proj",
    "shared up": "mlp.shared_expert.up_proj", "shared down": "mlp.shared_expert.down_proj",
    "shared gating": "mlp.shared_expert_gate",
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "router": "block_sparse_moe.gate", "expert gate": "block_sparse_moe.experts.{}.w1",
    "expert up": "block_sparse_moe.experts.{}.w3", "expert down": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
GPT_OSS = {
    **LLAMA, "router": "mlp.router", "expert gate": "", "expert up": "mlp.experts.gate_up_proj",
    "expert down": "mlp.experts.down_proj",
}  # fmt: skip
PHI3 = {**LLAMA, "qkv": "self_attn.qkv_proj", "gate up": "mlp.gate_up_proj"}
GPT2 = {
    "embedding": "wte", "positions": "wpe", "final": "ln_f", "output": "lm_head", "qkv": "attn.c_attn",
    "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "before attention": "ln_1", "before mlp": "ln_2",
}  # fmt: skip
NEOX = {
    "embedding": "embed_in", "final": "final_layer_norm", "output": "embed_out", "qkv": "attention.query_key_value",
    "o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
    "before attention": "input_layernorm", "before mlp": "post_attention_layernorm",
}  # fmt: skip
GPT2_KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon",
}  # fmt: skip
RMS = {"norm_eps": "rms_norm_eps"}
LAYER = {"norm_eps": "layer_norm_eps"}
SILU: Mapping[str, Any] = {"hidden_act": "silu", "norm_eps": 1e-6}


def _windows_everywhere(values: Asked, number: int) -> str:
    return "sliding_attention" if values.get("sliding_window") else "full_attention"


def _qwen_windows(values: Asked, number: int) -> str:
    slides = values.get("use_sliding_window") and number >= values.get("max_window_layers", 28)
    return "sliding_attention" if slides and values.get("sliding_window") else "full_attention"


def _every(pattern_key: str, default: int) -> Callable[[Asked, int], str]:
    """Windows but in every n-th layer."""

    def kind(values: Asked, number: int) -> str:
        return "sliding_attention" if (number + 1) % values.get(pattern_key, default) else "full_attention"

    return kind


def _two_in_turn(values: Asked, number: int) -> str:
    return "full_attention" if number % 2 else "sliding_attention"


def _full(values: Asked, number: int) -> str:
    return "full_attention"


def _no_experts(values: Asked, number: int) -> Experts | None:
    return None


def _qwen_experts(values: Asked, number: int) -> Experts | None:
    if number in values.get("mlp_only_layers", ()) or (number + 1) % values.get("decoder_sparse_step", 1):
        return None
    shared = values.get("shared_expert_intermediate_size", 0)
    return Experts(
        values.whole("num_experts", values.get("num_local_experts")), values.whole("num_experts_per_tok"), values.whole("moe_intermediate_size"),
        bool(values.get("norm_topk_prob", False)), shared=shared, shared_gated=shared > 0,
    )  # fmt: skip


def _mixtral_experts(values: Asked, number: int) -> Experts | None:
    count, used = values.whole("num_local_experts", 8), values.whole("num_experts_per_tok", 2)
    return Experts(count, used, values.whole("intermediate_size"))


def _gpt_oss_experts(values: Asked, number: int) -> Experts | None:
    count, used = values.whole("num_local_experts"), values.whole("num_experts_per_tok")
    limit = float(values.get("swiglu_limit", 7.0))
    return Experts(count, used, values.whole("intermediate_size"), alpha=1.702, beta=1.0, limit=limit)


@dataclass(frozen=True)
class Family:
    """What a family computes that Llama does not; functions are handed config.json's values."""

    names: Mapping[str, str] = field(default_factory=lambda: LLAMA)
    keys: Mapping[str, str] = field(default_factory=lambda: RMS)  # this project's name: config.json's
    defaults: Mapping[str, Any] = field(default_factory=lambda: SILU)  # what transformers takes for what is left out
    layers: str = "layers"  # what a block's tensors begin with
    norm: Literal["rms", "layer"] = "rms"
    offset: float = 0.0  # added to a norm's weight
    weighted: bool = True
    placements: Callable[[Asked], Norms] = lambda values: PRE
    parallel: Callable[[Asked], bool] = lambda values: False
    gated: bool = True
    merged: Literal["stacked", "by group"] = "stacked"  # how one matrix holds queries, keys and values
    turned: bool = False  # matrices are kept as [columns, rows]
    groups: Callable[[Asked, int], int] = lambda values, heads: values.whole("num_key_value_heads", heads)
    attention_scale: Callable[[Asked, int, int], float] = lambda values, width, number: width**-0.5
    sinks: bool = False
    normed: Callable[[Asked], bool] = lambda values: False  # queries and keys are
    head_norm: Literal["rms", "layer"] = "rms"
    norm_over: Literal["head", "each", "heads"] = "head"
    norm_after_rope: bool = False
    interleaved: bool = False  # rotation of neighbours
    rotates: Callable[[Asked, int, str], bool] = lambda values, number, kind: True
    layer_type: Callable[[Asked, int], str] = _full  # where config.json has no layer_types
    experts: Callable[[Asked, int], Experts | None] = _no_experts
    stacked: bool = False  # experts lie stacked in one tensor
    embedding_scale: Callable[[Asked], float] = lambda values: values.get("embedding_multiplier", 1.0)
    logit_scale: Callable[[Asked], float] = lambda values: values.get("logit_scale", 1.0)
    position_offset: int = 0  # row of the first learned position
    refuses: Callable[[Asked], str | None] = lambda values: None  # why this configuration is not computed


def _gemma(**more: Any) -> Family:
    about: dict[str, Any] = {
        "offset": 1.0,
        "embedding_scale": lambda values: math.sqrt(values.whole("hidden_size")),
        "defaults": {"hidden_act": "gelu_pytorch_tanh", "norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256},
    }
    return Family(**{**about, **more})


def _by_scalar(values: Asked, width: int, number: int) -> float:
    return float(values.get("query_pre_attn_scalar", 256)) ** -0.5


GEMMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh", "norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256,
    "sliding_window": 4096,
}  # fmt: skip
GEMMA_KEYS = {**RMS, "hidden_act": "hidden_activation"}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(layer_type=_windows_everywhere, defaults={**SILU, "sliding_window": 4096}),
    "ministral": Family(layer_type=_windows_everywhere, defaults={**SILU, "sliding_window": 4096}),
    "mixtral": Family(
        names=MIXTRAL, layer_type=_windows_everywhere, experts=_mixtral_experts,
        defaults={**SILU, "norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6},
    ),
    "qwen2": Family(layer_type=_qwen_windows, defaults={**SILU, "sliding_window": 4096}),
    "qwen2_moe": Family(
        names=QWEN_EXPERTS, layer_type=_qwen_windows, experts=_qwen_experts, defaults={**SILU, "sliding_window": 4096}
    ),
    "qwen3": Family(
        layer_type=_qwen_windows, normed=lambda values: True, defaults={**SILU, "sliding_window": 4096, "head_dim": 128}
    ),
    "qwen3_moe": Family(
        names=QWEN_EXPERTS, layer_type=_qwen_windows, experts=_qwen_experts, normed=lambda values: True, defaults=SILU
    ),
    "gemma": _gemma(keys={**RMS, "hidden_act": "hidden_act"}),
    "gemma2": _gemma(
        names=GEMMA2, keys=GEMMA_KEYS, placements=lambda values: SANDWICH, attention_scale=_by_scalar,
        layer_type=lambda values, number: _two_in_turn(values, number),
        defaults={**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": _gemma(
        names=GEMMA2, keys=GEMMA_KEYS, placements=lambda values: SANDWICH, attention_scale=_by_scalar,
        normed=lambda values: True, layer_type=_every("sliding_window_pattern", 6),
        defaults={**GEMMA_DEFAULTS, "rope_theta": 1e6},
    ),
    "phi3": Family(names=PHI3, layer_type=_windows_everywhere, defaults={**SILU, "norm_eps": 1e-5}),
    "gpt2": Family(
        names=GPT2, keys=GPT2_KEYS, layers="h", norm="layer", gated=False, turned=True,
        groups=lambda values, heads: heads,
        defaults={"hidden_act": "gelu_new", "norm_eps": 1e-5, "tie_word_embeddings": True},
        rotates=lambda values, number, kind: False,
        attention_scale=lambda values, width, number: (
            (width**-0.5 if values.get("scale_attn_weights", True) else 1.0)
            / (number + 1 if values.get("scale_attn_by_inverse_layer_idx") else 1)
        ),
    ),
    "gpt_neox": Family(
        names=NEOX, keys={**LAYER, "partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
        norm="layer", gated=False, merged="by group", groups=lambda values, heads: heads,
        parallel=lambda values: values.get("use_parallel_residual", True),
        defaults={"hidden_act": "gelu", "norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    ),
    "olmo2": Family(
        names=POSTED, placements=lambda values: POST, normed=lambda values: True, norm_over="heads",
        defaults={**SILU, "norm_eps": 1e-5},
    ),
    "gpt_oss": Family(
        names=GPT_OSS, experts=_gpt_oss_experts, stacked=True, sinks=True, layer_type=_two_in_turn,
        defaults={**SILU, "norm_eps": 1e-5},
    ),
}  # fmt: skip
