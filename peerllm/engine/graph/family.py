"""The families that the graph engine computes: a line or two each, verified by tests/engine/graph/test_families.py.

A line says how a family differs from Llama: names of tensors, values that config.json may omit, norms, rotation. A
model that no line can describe is left to the torch path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

from peerllm.engine.graph.structure import Placement, Routing


class ConfigReader(Protocol):
    """Reads config.json's values for a family's functions; implemented by describe.Values."""

    def get(self, name: str, default: Any = None) -> Any: ...
    def whole(self, name: str, default: int | None = None) -> int: ...
    def number(self, name: str, default: float) -> float: ...


Norms = tuple[Placement, ...]
MixerName = Literal["attention", "latent attention", "convolution", "delta rule", "state space"]
ATTENTION: Mapping[str, MixerName] = {"full_attention": "attention", "sliding_attention": "attention"}
Names = Mapping[str, str]
ONE: Norms = ("before attention",)
PRE: Norms = ("before attention", "before mlp")
POST: Norms = ("after attention", "after mlp")
SANDWICH: Norms = ("before attention", "after attention", "before mlp", "after mlp")

# ---- names of tensors ---------------------------------------------------------------------------------------------

LLAMA: Names = {
    "embedding": "embed_tokens", "final": "norm", "output": "lm_head",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "queries": "self_attn.q_norm", "keys": "self_attn.k_norm", "sinks": "self_attn.sinks",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "before attention": "input_layernorm", "before mlp": "post_attention_layernorm",
}  # fmt: skip
VAULTGEMMA = {**LLAMA, "before mlp": "pre_feedforward_layernorm"}
POSTED = {**LLAMA, "after attention": "post_attention_layernorm", "after mlp": "post_feedforward_layernorm"}
GEMMA2 = {**POSTED, "before mlp": "pre_feedforward_layernorm"}
GEMMA4 = {
    **GEMMA2, "own gate": "per_layer_input_gate", "own out": "per_layer_projection",
    "after own input": "post_per_layer_input_norm", "scalar": "layer_scalar",
    "own inputs": "embed_tokens_per_layer", "own projection": "per_layer_model_projection",
    "own norm": "per_layer_projection_norm",
}  # fmt: skip
HUNYUAN = {**LLAMA, "queries": "self_attn.query_layernorm", "keys": "self_attn.key_layernorm"}
HYPERCLOVAX = {**LLAMA, "after attention": "post_norm1", "after mlp": "post_norm2"}
STABLELM = {**LLAMA, "queries": "self_attn.q_layernorm.norms.{}", "keys": "self_attn.k_layernorm.norms.{}"}
STARCODER2 = {**LLAMA, "up": "mlp.c_fc", "down": "mlp.c_proj"}
PHI = {
    **LLAMA, "final": "final_layernorm", "o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2",
    "queries": "self_attn.q_layernorm", "keys": "self_attn.k_layernorm",
}  # fmt: skip
PERSIMMON = {**PHI, "qkv": "self_attn.query_key_value", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
GLM = {**LLAMA, "gate up": "mlp.gate_up_proj"}
GLM4 = {**GLM, "after attention": "post_self_attn_layernorm", "after mlp": "post_mlp_layernorm"}
PHI3 = {**GLM, "qkv": "self_attn.qkv_proj"}
OPT = {
    **LLAMA, "positions": "embed_positions", "final": "final_layer_norm", "o": "self_attn.out_proj", "up": "fc1",
    "down": "fc2", "before attention": "self_attn_layer_norm", "before mlp": "final_layer_norm",
}  # fmt: skip
GPT2 = {
    "embedding": "wte", "positions": "wpe", "final": "ln_f", "output": "lm_head", "qkv": "attn.c_attn",
    "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "before attention": "ln_1", "before mlp": "ln_2",
}  # fmt: skip
GPT_NEO = {
    "embedding": "wte", "positions": "wpe", "final": "ln_f", "output": "lm_head", "q": "attn.attention.q_proj",
    "k": "attn.attention.k_proj", "v": "attn.attention.v_proj", "o": "attn.attention.out_proj",
    "up": "mlp.c_fc", "down": "mlp.c_proj", "before attention": "ln_1", "before mlp": "ln_2",
}  # fmt: skip
GPTJ = {
    "embedding": "wte", "final": "ln_f", "output": "lm_head", "q": "attn.q_proj", "k": "attn.k_proj",
    "v": "attn.v_proj", "o": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out", "before attention": "ln_1",
}  # fmt: skip
NEOX = {
    "embedding": "embed_in", "final": "final_layer_norm", "output": "embed_out", "qkv": "attention.query_key_value",
    "o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
    "before attention": "input_layernorm", "before mlp": "post_attention_layernorm",
}  # fmt: skip
FALCON = {
    **NEOX, "embedding": "word_embeddings", "final": "ln_f", "output": "lm_head",
    "qkv": "self_attention.query_key_value", "o": "self_attention.dense",
}  # fmt: skip
QWEN_EXPERTS = {
    **LLAMA, "router": "mlp.gate", "expert gate": "mlp.experts.{}.gate_proj", "expert up": "mlp.experts.{}.up_proj",
    "expert down": "mlp.experts.{}.down_proj", "shared gate": "mlp.shared_expert.gate_proj",
    "shared up": "mlp.shared_expert.up_proj", "shared down": "mlp.shared_expert.down_proj",
    "shared gating": "mlp.shared_expert_gate",
}  # fmt: skip
FLEX_OLMO = {**QWEN_EXPERTS, **POSTED}
MIXTRAL = {
    **LLAMA, "router": "block_sparse_moe.gate", "expert gate": "block_sparse_moe.experts.{}.w1",
    "expert up": "block_sparse_moe.experts.{}.w3", "expert down": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
GPT_OSS = {
    **LLAMA, "router": "mlp.router", "expert gate": "", "expert up": "mlp.experts.gate_up_proj",
    "expert down": "mlp.experts.down_proj",
}  # fmt: skip
GRANITE_EXPERTS = {
    **LLAMA, "router": "block_sparse_moe.router.layer", "expert gate": "",
    "expert up": "block_sparse_moe.input_linear.weight", "expert down": "block_sparse_moe.output_linear.weight",
    "shared gate up": "shared_mlp.input_linear", "shared down": "shared_mlp.output_linear",
}  # fmt: skip

LFM2 = {
    **LLAMA, "final": "embedding_norm", "o": "self_attn.out_proj", "queries": "self_attn.q_layernorm",
    "keys": "self_attn.k_layernorm", "mixed": "conv.in_proj", "mixer out": "conv.out_proj", "taps": "conv.conv.weight",
    "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
    "before attention": "operator_norm", "before mlp": "ffn_norm",
}  # fmt: skip
QWEN35 = {
    **LLAMA, "mixed": "linear_attn.in_proj_qkv", "z": "linear_attn.in_proj_z", "beta": "linear_attn.in_proj_b",
    "decay": "linear_attn.in_proj_a", "mixer out": "linear_attn.out_proj", "taps": "linear_attn.conv1d.weight",
    "A": "linear_attn.A_log", "dt": "linear_attn.dt_bias", "mixer norm": "linear_attn.norm.weight",
}  # fmt: skip
QWEN35_EXPERTS = {**QWEN35, **{role: name for role, name in QWEN_EXPERTS.items() if role not in LLAMA}}
QWEN3_NEXT = {**QWEN35_EXPERTS, "qkvz": "linear_attn.in_proj_qkvz", "ba": "linear_attn.in_proj_ba"}
GRANITE_HYBRID = {
    **GRANITE_EXPERTS, "mixed": "mamba.in_proj", "mixer out": "mamba.out_proj", "taps": "mamba.conv1d.weight",
    "A": "mamba.A_log", "D": "mamba.D", "dt": "mamba.dt_bias", "mixer norm": "mamba.norm.weight",
}  # fmt: skip
LFM2_EXPERTS = {
    **LFM2, "router": "feed_forward.gate", "choice": "feed_forward.expert_bias",
    "expert gate": "feed_forward.experts.{}.w1", "expert up": "feed_forward.experts.{}.w3",
    "expert down": "feed_forward.experts.{}.w2",
}  # fmt: skip
DEEPSEEK = {
    **QWEN_EXPERTS, "latents": "self_attn.kv_a_proj_with_mqa", "latent norm": "self_attn.kv_a_layernorm.weight",
    "kv": "self_attn.kv_b_proj", "kv keys": "self_attn.k_b_proj", "kv values": "self_attn.v_b_proj",
    "query latents": "self_attn.q_a_proj", "query norm": "self_attn.q_a_layernorm.weight",
    "q up": "self_attn.q_b_proj", "choice": "mlp.gate.e_score_correction_bias",
    "shared gate": "mlp.shared_experts.gate_proj", "shared up": "mlp.shared_experts.up_proj",
    "shared down": "mlp.shared_experts.down_proj",
}  # fmt: skip
del DEEPSEEK["shared gating"]

# ---- values of config.json ----------------------------------------------------------------------------------------

COMMON: Mapping[str, Any] = {  # the keys that every family reads, with transformers' defaults
    "hidden_size": None, "vocab_size": None, "num_hidden_layers": None, "num_attention_heads": None,
    "num_key_value_heads": None, "head_dim": None, "intermediate_size": None, "max_position_embeddings": 2048,
    "hidden_act": "silu", "norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "rope_parameters": None, "rope_scaling": None, "original_max_position_embeddings": None,
}  # fmt: skip
RMS = {"norm_eps": "rms_norm_eps"}
LAYER = {"norm_eps": "layer_norm_eps"}
HEADS_ALONE = {"num_key_value_heads": "", "head_dim": ""}  # as many key heads as query heads, each hidden / heads wide
GPT2_KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon", **HEADS_ALONE,
}  # fmt: skip
SIX = {"norm_eps": 1e-6}
WINDOWS = {"sliding_window": 4096, "layer_types": None}
QWEN_WINDOWS = {**WINDOWS, "use_sliding_window": False, "max_window_layers": 28}
QWEN_MOE = {
    "num_experts_per_tok": 4, "num_experts": 60, "num_local_experts": None, "moe_intermediate_size": 1408,
    "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": (),
}  # fmt: skip
GEMMA_DEFAULTS = {
    **SIX, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 16,
    "use_bidirectional_attention": None,
}  # fmt: skip
GEMMA2_DEFAULTS = {
    **GEMMA_DEFAULTS, **WINDOWS, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
LFM2_DEFAULTS = {
    "rope_theta": 1e6, "num_key_value_heads": 8, "tie_word_embeddings": True, "tie_embedding": None,
    "layer_types": None, "conv_L_cache": 3, "max_position_embeddings": 128_000,
}  # fmt: skip
QWEN35_DEFAULTS = {
    **SIX, "head_dim": 256, "num_key_value_heads": 4, "partial_rotary_factor": 0.25, "layer_types": None,
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
LATENT: Mapping[str, MixerName] = {"full_attention": "latent attention"}
LATENT_DEFAULTS = {
    **SIX, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "attention_bias": False, "peerllm_kv_apart": False,
}  # fmt: skip
DEEPSEEK_KEYS = {**RMS, "num_experts": "n_routed_experts", "head_dim": ""}
GRANITE_DEFAULTS = {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
}  # fmt: skip


def _windows(values: ConfigReader, number: int) -> str:
    return "full_attention" if values.get("sliding_window") is None else "sliding_attention"


def _qwen_windows(values: ConfigReader, number: int) -> str:
    slides = values.get("use_sliding_window") and number >= values.get("max_window_layers", 0)
    return _windows(values, number) if slides else "full_attention"


def _qwen2_moe_windows(values: ConfigReader, number: int) -> str:
    slides = values.get("use_sliding_window") and number % 2 == 0 and number < values.get("max_window_layers")
    return "sliding_attention" if slides else "full_attention"


def _smollm3_windows(values: ConfigReader, number: int) -> str:
    slides = values.get("use_sliding_window") and not _smollm3_rotates(values, number, "")
    return _windows(values, number) if slides else "full_attention"


def _smollm3_rotates(values: ConfigReader, number: int, kind: str) -> bool:
    rotated = values.get("no_rope_layers")
    return bool((number + 1) % values.get("no_rope_layer_interval") if rotated is None else rotated[number])


def _neo_windows(values: ConfigReader, number: int) -> str:
    types = values.get("attention_types")
    kinds = (kind for some, times in types if some for _ in range(times) for kind in some)  # `times` may be huge
    return {"global": "full_attention", "local": "sliding_attention"}[next(islice(kinds, number, None), "")]


def _full_at(rest: int, default: int, pattern: str = "") -> Callable[[ConfigReader, int], str]:
    """One of every `default` layers (or of config.json's `pattern`) attends fully, the others in windows."""

    def kind(values: ConfigReader, number: int) -> str:
        every = values.get(pattern, default)
        return "full_attention" if number % every == rest % every else "sliding_attention"

    return kind


def _falcon(values: ConfigReader) -> dict[str, Any]:
    if values.get("alibi"):
        return {"refused": "positions by alibi"}
    if values.get("new_decoder_architecture"):
        if values.get("num_ln_in_parallel_attn", 2) == 1:
            return {"placements": ONE}
        return {"names": {**FALCON, "before attention": "ln_attn", "before mlp": "ln_mlp"}}
    groups = 1 if values.get("multi_query") else values.whole("num_attention_heads")
    return {"groups": groups, "placements": ONE if values.get("use_parallel_residual") else PRE}


def _gemma(values: ConfigReader) -> dict[str, Any]:
    if values.get("use_bidirectional_attention"):
        return {"refused": "attention in both directions"}
    return {"activation": "gelu_pytorch_tanh" if values.get("hidden_act") == "gelu" else None}  # as transformers has it


def _opt(values: ConfigReader) -> dict[str, Any]:
    before, affine = values.get("do_layer_norm_before"), values.get("layer_norm_elementwise_affine")
    width = values.get("word_embed_proj_dim", values.get("hidden_size"))
    usual = before and affine and not values.get("_remove_final_layer_norm") and width == values.get("hidden_size")
    return {} if usual else {"refused": "the layout of opt-350m"}


def _phi3(values: ConfigReader) -> dict[str, Any]:
    about = values.get("rope_scaling", values.get("rope_parameters", {}))
    longer = "short_factor" in about  # transformers treats this as longrope, whatever its name
    return {"refused": "rotary embeddings that follow the length of a sequence"} if longer else {}


def _granite_swa(values: ConfigReader) -> dict[str, Any]:
    about = values.get("rope_parameters", {})
    usual = about.get("rope_theta", values.get("rope_theta"))
    other = any(theta != usual for theta in values.get("layer_rope_theta", ()))
    return {"refused": "layers with rotations of their own"} if other else {}


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


def _after_dense(name: str) -> Callable[[ConfigReader, int], bool]:
    """Experts are in all layers but the first, whose number config.json has as `name`."""
    return lambda values, number: bool(number >= (values.get(name, 0)))


def _glm_lite_sparse(values: ConfigReader, number: int) -> bool:
    kinds = values.get("mlp_layer_types")
    return number > 0 if kinds is None else bool(kinds[number] == "sparse")


def _qwen35_layers(values: ConfigReader, number: int) -> str:
    return "linear_attention" if (number + 1) % values.whole("full_attention_interval") else "full_attention"


def _no_changes(values: ConfigReader) -> dict[str, Any]:
    return {}


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
    return "full_attention" if number in (values.whole("num_hidden_layers") - 1, number // 6 * 6 + 5) else (
        "sliding_attention"
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


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama. Functions are given config.json's values."""

    names: Names = field(default_factory=lambda: LLAMA)
    keys: Mapping[str, str] = field(default_factory=lambda: RMS)  # our name: config.json's; "": not read
    defaults: Mapping[str, Any] = field(default_factory=dict)  # beside COMMON; no other values are read
    by: Callable[[ConfigReader], dict[str, Any]] = _no_changes  # fields of this line that config.json's values change
    refused: str | None = None  # why the graph engine does not compute this configuration
    layers: str = "layers"  # the prefix of a block's tensors
    norm: Literal["rms", "layer"] = "rms"
    offset: float = 0.0  # added to a norm's weight
    weighted: bool = True
    placements: Norms = PRE
    parallel: bool = False
    gated: bool = True
    activation: str | None = None  # overrides config.json's
    merged: Literal["stacked", "by group"] = "stacked"  # how one matrix holds queries, keys and values
    turned: bool = False  # files hold matrices as [columns, rows]
    groups: int | None = None  # overrides config.json's
    values: Mapping[str, Any] = field(default_factory=dict)  # override config.json's, by our names
    sinks: bool = False
    gated_attention: bool = False  # see structure.Attention.gated
    mixers: Mapping[str, MixerName] = field(default_factory=lambda: ATTENTION)  # by the kind of layer
    normed: bool = False  # queries and keys are normalised
    head_norm: Literal["rms", "layer"] = "rms"
    norm_over: Literal["head", "each", "heads"] = "head"
    norm_after_rope: bool = False
    interleaved: bool = False  # rotation turns pairs of neighbours
    alpha: bool = False  # "dynamic" rotation with an alpha means a larger base
    local_theta: float | None = None  # the rotation's base in layers with a window, if it differs there
    rotates: Callable[[ConfigReader, int, str], bool] = lambda values, number, kind: True
    layer_type: Callable[[ConfigReader, int], str] = lambda values, number: "full_attention"  # without layer_types
    experts: Literal["", "each", "interleaved", "halves"] = ""  # how files hold them, see weights.Stacks
    sparse: Callable[[ConfigReader, int], bool] = lambda values, number: True  # whether a layer has experts
    routing: Routing | None = None
    by_block: Callable[[ConfigReader, int, str], Mapping[str, Any]] = lambda values, number, kind: {}  # values of one
    value_norm: bool = False  # each head's values are normalised, without a weight
    own_input: str = ""  # the value that says how many numbers of an input each block alone reads
    scaled_blocks: bool = False  # each block has a number that what comes out of it is multiplied by
    scaled_embedding: bool = False  # multiplied by the square root of its width
    position_offset: int = 0  # the row of position 0 among learned positions


def _unrotated(values: ConfigReader, number: int, kind: str) -> bool:
    return False


def _in_windows(values: ConfigReader, number: int, kind: str) -> bool:
    return kind == "sliding_attention"


def _gpt2(**more: Any) -> Family:
    about: dict[str, Any] = {
        "names": GPT2, "keys": GPT2_KEYS, "layers": "h", "norm": "layer", "gated": False, "rotates": _unrotated,
        "defaults": {
            "hidden_act": "gelu_new", "tie_word_embeddings": True, "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
    }  # fmt: skip
    return Family(**{**about, **more})


def _gemma2(**more: Any) -> Family:
    about: dict[str, Any] = {
        "names": GEMMA2, "keys": {**RMS, "hidden_act": "hidden_activation"}, "defaults": GEMMA2_DEFAULTS, "by": _gemma,
        "offset": 1.0, "scaled_embedding": True, "placements": SANDWICH, "layer_type": _full_at(1, 2),
    }  # fmt: skip
    return Family(**{**about, **more})


FAMILIES: Mapping[str, Family] = {
    "llama": Family(defaults=SIX),
    "mistral": Family(layer_type=_windows, defaults={**SIX, "sliding_window": 4096, "num_key_value_heads": 8}),
    "ministral": Family(layer_type=_windows, defaults={**SIX, **WINDOWS, "num_key_value_heads": 8}),
    "mixtral": Family(
        names=MIXTRAL, layer_type=_windows, experts="each",
        defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8,
            "num_experts_per_tok": 2},
    ),
    "qwen2": Family(layer_type=_qwen_windows, defaults={**SIX, **QWEN_WINDOWS, "num_key_value_heads": 32}),
    "qwen2_moe": Family(
        names=QWEN_EXPERTS, layer_type=_qwen2_moe_windows, experts="each",
        defaults={**SIX, **QWEN_WINDOWS, **QWEN_MOE, "num_key_value_heads": 16,
            "shared_expert_intermediate_size": 5632},
    ),
    "qwen3": Family(
        layer_type=_qwen_windows, normed=True,
        defaults={**SIX, **QWEN_WINDOWS, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "qwen3_moe": Family(
        names=QWEN_EXPERTS, layer_type=_qwen_windows, experts="each", normed=True,
        defaults={**SIX, **QWEN_MOE, "num_key_value_heads": 4, "sliding_window": 4096, "use_sliding_window": False,
            "num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768},
    ),
    "gemma": Family(offset=1.0, scaled_embedding=True, defaults=GEMMA_DEFAULTS, by=_gemma),
    "gemma2": _gemma2(),
    "vaultgemma": _gemma2(names=VAULTGEMMA, placements=PRE),
    "gemma3_text": _gemma2(
        normed=True, layer_type=_full_at(-1, 6, "sliding_window_pattern"), local_theta=10000.0,
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
    "phi": Family(
        names=PHI, keys=LAYER, norm="layer", head_norm="layer", placements=ONE, parallel=True, gated=False,
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "qk_layernorm": False},
    ),
    "phi3": Family(
        names=PHI3, layer_type=_windows, defaults={"partial_rotary_factor": 1.0, "sliding_window": None}, by=_phi3,
    ),
    "persimmon": Family(
        names=PERSIMMON, keys={**LAYER, **HEADS_ALONE}, norm="layer", head_norm="layer", gated=False, merged="by group",
        defaults={"hidden_act": "relu2", "partial_rotary_factor": 0.5, "qk_layernorm": True},
    ),
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
        names=OPT, norm="layer", gated=False, rotates=_unrotated, position_offset=2, by=_opt,
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
    "stablelm": Family(
        names=STABLELM, keys={**LAYER, "head_dim": ""}, norm="layer", head_norm="layer", norm_over="each",
        defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25, "qk_layernorm": False,
            "use_parallel_residual": False},
        by=lambda values: {"placements": ONE} if values.get("use_parallel_residual") else {},
    ),
    "starcoder2": Family(
        names=STARCODER2, keys={"norm_eps": "norm_epsilon"}, norm="layer", gated=False, layer_type=_windows,
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
        layer_type=_full_at(-1, 4, "sliding_window_pattern"), rotates=_in_windows,
        defaults={**WINDOWS, "tie_word_embeddings": True, "logit_scale": 0.0625, "sliding_window_pattern": 4},
    ),
    "olmo": Family(keys={"norm_eps": ""}, norm="layer", weighted=False, defaults={"clip_qkv": None}),
    "olmo2": Family(names=POSTED, placements=POST, normed=True, norm_over="heads"),
    "olmo3": Family(
        names=POSTED, placements=POST, normed=True, norm_over="heads", layer_type=_full_at(-1, 4), local_theta=500000.0,
        defaults={**WINDOWS, "rope_theta": 500000.0},
    ),
    "olmoe": Family(
        names=QWEN_EXPERTS, normed=True, norm_over="heads", experts="each",
        defaults={"num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False, "clip_qkv": None},
        by=lambda values: {"refused": "queries and keys cut off after their norm"} if values.get("clip_qkv") else {},
    ),
    "flex_olmo": Family(
        names=FLEX_OLMO, placements=POST, normed=True, norm_over="heads", experts="each",
        defaults={**SIX, "rope_theta": 500000.0, "num_experts_per_tok": 5, "num_experts": 7, "norm_topk_prob": False},
    ),
    "granite": Family(defaults={**SIX, **GRANITE_DEFAULTS}),
    "granite_swa": Family(
        layer_type=_full_at(0, 4), sinks=True, by=_granite_swa,
        defaults={**GRANITE_DEFAULTS, **WINDOWS, "num_key_value_heads": 4, "sliding_window": 128,
            "tie_word_embeddings": True, "layer_rope_theta": None},
    ),
    "granitemoe": Family(
        names=GRANITE_EXPERTS, experts="halves",
        defaults={**SIX, **GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "granitemoeshared": Family(
        names=GRANITE_EXPERTS, experts="halves",
        keys={**RMS, "shared_expert_intermediate_size": "shared_intermediate_size"},
        defaults={**SIX, **GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 0},
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
        defaults={**SIX, **WINDOWS, "tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 2e6,
            "sliding_window": None, "use_sliding_window": False, "no_rope_layers": None, "no_rope_layer_interval": 4},
    ),
    "exaone4": Family(
        names=POSTED, placements=POST, normed=True, layer_type=_full_at(-1, 4, "sliding_window_pattern"),
        rotates=lambda values, number, kind: values.get("sliding_window") is None or kind == "sliding_attention",
        defaults={**WINDOWS, "num_key_value_heads": 32, "sliding_window_pattern": 4},
    ),
    "gpt_oss": Family(
        names=GPT_OSS, experts="interleaved", sinks=True, layer_type=_full_at(1, 2),
        defaults={**WINDOWS, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0,
            "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
            "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096}},
    ),
    "ernie4_5": Family(
        interleaved=True,
        defaults={"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True, "rope_theta": 500000.0},
    ),
    "seed_oss": Family(defaults={**SIX, "num_key_value_heads": 8, "head_dim": 128}),
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
        layer_type=_full_at(0, 4),
        defaults={**WINDOWS, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 8192, "rope_theta": 1e6,
            "rope_parameters": {"rope_type": "llama3", "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_theta": 1e6}},
    ),
    "internlm3": Family(defaults={"num_key_value_heads": 2, "head_dim": 128}),
    "iquestcoder": Family(defaults={"num_key_value_heads": 8, "head_dim": 128}),
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
        defaults={**SIX, **GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 1024, "position_embedding_type": None, "layer_types": None,
            "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": "auto", "mamba_d_conv": 4,
            "mamba_expand": 2, "time_step_limit": None},
    ),
    "lfm2_moe": Family(
        names=LFM2_EXPERTS, keys={}, normed=True, mixers={**ATTENTION, "conv": "convolution"}, experts="each",
        by=_lfm2_experts, sparse=_after_dense("num_dense_layers"),
        defaults={**LFM2_DEFAULTS, "intermediate_size": 7168, "moe_intermediate_size": 1792, "num_dense_layers": 2,
            "num_experts_per_tok": 4, "num_experts": 32, "use_expert_bias": True, "routed_scaling_factor": 1.0,
            "norm_topk_prob": True},
    ),
    "deepseek_v2": Family(
        names=DEEPSEEK, mixers=LATENT, interleaved=True, experts="each", by=_deepseek_v2,
        keys={**DEEPSEEK_KEYS, "norm_topk_prob": ""}, sparse=_after_dense("first_k_dense_replace"),
        defaults={**LATENT_DEFAULTS, "num_experts": 64, "num_experts_per_tok": None, "moe_intermediate_size": 1407,
            "n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "n_group": None,
            "topk_group": None, "topk_method": "greedy", "norm_topk_prob": False},
    ),
    "deepseek_v3": Family(
        names=DEEPSEEK, mixers=LATENT, experts="each", by=_deepseek_v3, keys=DEEPSEEK_KEYS,
        sparse=_after_dense("first_k_dense_replace"),
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
    "hyperclovax": Family(
        names=HYPERCLOVAX, keys={**RMS, "logit_scale": "logits_scaling"},
        defaults={**SIX, "embedding_multiplier": 1.0, "logit_scale": 1.0, "residual_multiplier": 1.0,
            "attention_multiplier": None, "use_post_norm": True},
        by=lambda values: {"placements": SANDWICH if values.get("use_post_norm") else PRE},
    ),
}  # fmt: skip
