"""The architectures of GGUF files whose models are computed: a line or two each, verified by tests of this folder.

A line says which family of transformers an architecture is, what llama.cpp calls its tensors, and how they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peerllm.daemon.weights.gguf.block_names import (
    DEEPSEEK2,
    EXPERTS,
    FALCON,
    FC,
    GATE_UP,
    GEMMA2,
    GEMMA4,
    GLM4,
    GPT2,
    GPT_OSS,
    GRANITE_HYBRID,
    GRANITE_MOE,
    LFM2,
    LFM2_MOE,
    LLAMA,
    MIXTRAL,
    NEOX,
    NORMED,
    PHI,
    POSTED,
    QWEN35,
    Names,
)
from peerllm.daemon.weights.gguf.hyperparameters import Hyperparameters

More = Callable[[Hyperparameters], dict[str, Any]]

# ---- keys of config.json --------------------------------------------------------------------------------------------

LAYER: Names = {"rms_norm_eps": "layer_norm_eps"}
GPT2_KEYS: Names = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
    "head_dim": "",
}  # fmt: skip


MOE = "moe_intermediate_size"
SIGMOID = 2  # by which experts are chosen, as files number it


def _llama(values: Hyperparameters) -> dict[str, Any]:
    if not values.whole("expert_count", 0):
        return {}
    return {"model_type": "mixtral", **values.experts("num_local_experts")}


def _mistral3(values: Hyperparameters) -> dict[str, Any]:
    if values.number("attention.temperature_scale", 0.0) or values.number("rope.scaling.yarn_log_multiplier", 0.0):
        raise values.wrong("scales its attention by position, which is not computed")
    return {}


def _qwen2_moe(values: Hyperparameters) -> dict[str, Any]:
    shared = values.rows("ffn_up_shexp")
    return {**values.experts("num_experts", MOE, False), "shared_expert_intermediate_size": shared or 0}


def _qwen3_moe(values: Hyperparameters) -> dict[str, Any]:
    return values.experts("num_experts", MOE, True)


def _gemma2(values: Hyperparameters) -> dict[str, Any]:
    return {
        **_gemma_scale(values, layers_27b=46),
        "attn_logit_softcapping": values.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": values.number("final_logit_softcapping", 30.0),
        **values.windows(2, default=4096),
    }


def _gemma3(values: Hyperparameters) -> dict[str, Any]:
    local = values.number("rope.freq_base_swa", 10000.0)
    about = {"rope_local_base_freq": local, **_gemma_scale(values, layers_27b=62), **values.windows(6)}
    if capped := values.number("final_logit_softcapping", 0.0):
        about["final_logit_softcapping"] = capped
    return about


def _gemma4(values: Hyperparameters) -> dict[str, Any]:
    about = values.windows(6)
    kinds, full = about["layer_types"], about["layer_types"].index("full_attention")
    shared = values.whole("attention.shared_kv_layers", 0)
    groups = values.each("attention.head_count_kv", values.whole("attention.head_count"))
    wide = values.each("feed_forward_length", 0)
    first = values.blocks - shared  # that makes no keys and values
    expected = [groups[full] if kind == "full_attention" else groups[0] for kind in kinds]
    double = wide[-1] == 2 * wide[0]
    if groups != expected or wide != wide[:1] * first + [wide[0] * (1 + double)] * shared or kinds[0] == kinds[full]:
        raise values.wrong("has blocks that differ in another way than is computed")
    alike = not values.has("attn_v", full)
    if groups[0] != groups[full] and not alike:
        raise values.wrong("has more heads of keys in some blocks than in others, which is not computed")
    rotations = {
        "sliding_attention": {"rope_type": "default", "rope_theta": values.number("rope.freq_base_swa", 10000.0)},
        "full_attention": {
            "rope_type": "proportional", "rope_theta": values.number("rope.freq_base", 1e6),
            "partial_rotary_factor": values.turning(values.width),
        },
    }  # fmt: skip
    return {
        **about, "rope_scaling": None, "rope_parameters": rotations, "global_head_dim": values.width,
        "head_dim": values.whole("attention.key_length_swa"), "attention_k_eq_v": alike,
        "num_global_key_value_heads": groups[full], "num_kv_shared_layers": shared, "use_double_wide_mlp": double,
        "hidden_size_per_layer_input": values.whole("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": values.rows_beside("per_layer_token_embd") or 1,
        "final_logit_softcapping": values.number("final_logit_softcapping", 0.0) or None,
    }  # fmt: skip


def _no_experts(values: Hyperparameters) -> Names:
    if values.whole("expert_count", 0):
        raise values.wrong("has experts beside a feed-forward, which is not computed")
    return {}


def _gemma_scale(values: Hyperparameters, layers_27b: int) -> dict[str, Any]:
    """The largest model of each generation scales by hidden size over heads; the file does not say so."""
    heads, width = values.whole("attention.head_count"), values.width
    return {"query_pre_attn_scalar": values.hidden // heads if values.blocks == layers_27b else width}


def _olmo2(values: Hyperparameters) -> dict[str, Any]:
    if not values.whole("attention.sliding_window", 0):
        return {}
    theta = values.number("rope.freq_base", 10000.0)
    local = {"rope_type": "default", "rope_theta": values.number("rope.freq_base_swa", theta)}
    scaled = {"rope_type": "default", "rope_theta": theta, **values.scaling()}
    rotations = {"sliding_attention": local, "full_attention": scaled}
    return {"model_type": "olmo3", "rope_scaling": None, "rope_parameters": rotations, **values.windows(4)}


def _granite(values: Hyperparameters) -> dict[str, Any]:
    if not values.get("rope.scaling.finetuned", True):
        raise values.wrong("rotates nothing by position, which is not computed")
    return _granite_factors(values)


def _granite_factors(values: Hyperparameters) -> dict[str, Any]:
    return {
        "attention_multiplier": values.number("attention.scale", 0.0) or values.width**-0.5,
        "embedding_multiplier": values.number("embedding_scale", 1.0),
        "residual_multiplier": values.number("residual_scale", 1.0),
        "logits_scaling": values.number("logit_scale", 1.0),
    }


def _granite_moe(values: Hyperparameters) -> dict[str, Any]:
    about = {**_granite(values), **values.experts("num_local_experts")}
    if shared := values.rows("ffn_up_shexp"):
        about |= {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    return about


def _gpt_oss(values: Hyperparameters) -> dict[str, Any]:
    scaling = values.scaling()
    if scaling.get("rope_type") == "yarn":
        scaling["truncate"] = False
    return {"rope_scaling": scaling or None, **values.experts("num_local_experts"), **values.windows(2)}


def _falcon(values: Hyperparameters) -> dict[str, Any]:
    two = values.has("attn_norm_2")
    new = two or values.groups > 1
    return {
        "new_decoder_architecture": new, "num_ln_in_parallel_attn": 2 if two else 1, "multi_query": True,
        "parallel_attn": True, "alibi": False, "bias": False, "num_kv_heads": values.groups,
    }  # fmt: skip


def _stablelm(values: Hyperparameters) -> dict[str, Any]:
    return {"use_parallel_residual": not values.has("ffn_norm"), "qk_layernorm": values.has("attn_q_norm")}


def _cohere(values: Hyperparameters) -> dict[str, Any]:
    return {"logit_scale": values.number("logit_scale", 1.0), "use_qk_norm": values.has("attn_q_norm")}


def _cohere2(values: Hyperparameters) -> dict[str, Any]:
    return {"logit_scale": values.number("logit_scale", 1.0), **values.windows(4)}


def _glm4(values: Hyperparameters) -> dict[str, Any]:
    if any(values.get("rope.dimension_sections", ())):
        raise values.wrong("rotates by places in an image, which is not computed")
    return {}


def _exaone4(values: Hyperparameters) -> dict[str, Any]:
    return values.windows(4, default=0)


def _olmo(values: Hyperparameters) -> dict[str, Any]:
    return {"clip_qkv": values.number("attention.clamp_kqv", 0.0) or None}


def _phi3(values: Hyperparameters) -> dict[str, Any]:
    return {"sliding_window": values.whole("attention.sliding_window", 0) or None}


def _lfm2(values: Hyperparameters) -> dict[str, Any]:
    if values.whole("attention.sliding_window", 0):
        raise values.wrong("has sliding windows, which are not computed")
    return {
        "conv_L_cache": values.whole("shortconv.l_cache"), "layer_types": values.kinds("shortconv.conv.weight", "conv"),
        "block_auto_adjust_ff_dim": False,
    }  # fmt: skip


def _lfm2_moe(values: Hyperparameters) -> dict[str, Any]:
    dense = values.whole("leading_dense_block_count", 0)
    return {**_lfm2(values), **values.experts("num_experts", MOE, dense=dense), "num_dense_layers": dense}


def _granite_hybrid(values: Hyperparameters) -> dict[str, Any]:
    heads, experts = values.whole("ssm.time_step_rank"), values.whole("expert_count", 0)
    return {
        **_granite_factors(values), **(values.experts("num_local_experts") if experts else {"num_local_experts": 0}),
        "shared_intermediate_size": values.rows("ffn_up_shexp" if experts else "ffn_up"),
        "position_embedding_type": "rope" if values.get("rope.scaling.finetuned", True) else None,
        "mamba_n_heads": heads, "mamba_d_head": values.whole("ssm.inner_size") // max(heads, 1),
        "mamba_n_groups": values.whole("ssm.group_count"), "mamba_d_state": values.whole("ssm.state_size"),
        "mamba_d_conv": values.whole("ssm.conv_kernel"), "layer_types": values.kinds("ssm_a", "mamba"),
    }  # fmt: skip


def _deepseek2(values: Hyperparameters) -> dict[str, Any]:
    """DeepSeek V2 and V3, GLM-4.7-Flash (which computes as V3 does) and Youtu (which has no experts)."""
    turned, scaling = values.whole("rope.dimension_count"), values.scaling()
    if weight := values.number("rope.scaling.yarn_log_multiplier", 0.0):
        scaling |= {"mscale": 10 * weight, "mscale_all_dim": 10 * weight}
    about: dict[str, Any] = {
        "model_type": "youtu", "kv_lora_rank": values.whole("attention.kv_lora_rank"),
        "q_lora_rank": values.whole("attention.q_lora_rank", 0) or None, "qk_rope_head_dim": turned,
        "qk_nope_head_dim": values.whole("attention.key_length_mla", values.width) - turned,
        "v_head_dim": values.whole("attention.value_length_mla", values.whole("attention.value_length", 0)),
        "num_key_value_heads": values.whole("attention.head_count"), "rope_scaling": scaling or None,
        "peerllm_kv_apart": values.has("attn_k_b"),
    }  # fmt: skip
    wide = values.rows("ffn_up_exps")
    if wide is None:
        return about
    groups, scale = values.whole("expert_group_count", 0) or 1, values.number("expert_weights_scale", 0.0) or 1.0
    dense, normalised = values.whole("leading_dense_block_count", 0), bool(values.get("expert_weights_norm", False))
    about |= {
        "n_routed_experts": values.whole("expert_count"), "num_experts_per_tok": values.whole("expert_used_count"),
        "moe_intermediate_size": wide, "n_shared_experts": (values.rows("ffn_up_shexp") or 0) // wide,
        "first_k_dense_replace": dense, "routed_scaling_factor": scale, "n_group": groups,
        "topk_group": values.whole("expert_group_used_count", 0) or groups,
    }  # fmt: skip
    if values.whole("expert_gating_func", 1) == SIGMOID:
        return {**about, "model_type": "deepseek_v3", "norm_topk_prob": normalised}
    if normalised:
        raise values.wrong("has experts whose softmax weights are made to sum to one, which is not computed")
    method = "greedy" if groups == 1 else "group_limited_greedy"
    return {**about, "model_type": "deepseek_v2", "topk_method": method}


def _qwen35(values: Hyperparameters) -> dict[str, Any]:
    heads = values.whole("ssm.time_step_rank")
    return {
        "linear_num_key_heads": values.whole("ssm.group_count"), "linear_num_value_heads": heads,
        "linear_key_head_dim": values.whole("ssm.state_size"),
        "linear_value_head_dim": values.whole("ssm.inner_size") // max(heads, 1),
        "linear_conv_kernel_dim": values.whole("ssm.conv_kernel"),
        "layer_types": values.kinds("ssm_a", "linear_attention"),
    }  # fmt: skip


def _qwen35_moe(values: Hyperparameters) -> dict[str, Any]:
    return {
        **_qwen35(values), **values.experts("num_experts", MOE),
        "shared_expert_intermediate_size": values.rows("ffn_up_shexp"),
    }  # fmt: skip


def _nothing(values: Hyperparameters) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class GGUFArchitecture:
    """How an architecture's files differ from Llama's."""

    model_type: str
    names: Names = field(default_factory=lambda: LLAMA)
    keys: Names = field(default_factory=dict)  # config.json's, where a family has its own; "": it has none
    more: More = _nothing  # values of config.json that are this architecture's own
    prefix: str = "model."
    layers: str = "layers"
    paired: bool = False  # rows of queries and keys are stored so that rotation turns neighbours
    norm_offset_added: bool = False  # norms' weights have the 1 added that the family adds
    decays_stored: bool = False  # -exp(A_log) stands in the place of A_log
    value_heads_tiled: bool = False  # those of one key head do not lie side by side, but one behind the other's
    latent: bool = False  # keys and values are made of latents: their widths are others
    partial: bool = False  # a part of each head may be rotated; config.json has partial_rotary_factor
    mixed: bool = False  # blocks differ in their heads of keys and in their feed-forwards
    renamed: Callable[[Hyperparameters], Names] = lambda values: {}  # names that some files of it have


ARCHITECTURES: Mapping[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture("llama", MIXTRAL, more=_llama, paired=True),
    "mistral3": GGUFArchitecture("llama", more=_mistral3, paired=True),
    "internlm2": GGUFArchitecture("llama", paired=True),
    "exaone": GGUFArchitecture("llama"),
    "qwen2": GGUFArchitecture("qwen2"),
    "qwen2vl": GGUFArchitecture("qwen2"),  # positions of text alone are rotated as in qwen2; so too in qwen3vl
    "qwen2moe": GGUFArchitecture("qwen2_moe", {**LLAMA, **EXPERTS}, more=_qwen2_moe),
    "qwen3": GGUFArchitecture("qwen3", NORMED),
    "qwen3vl": GGUFArchitecture("qwen3", NORMED),
    "qwen3moe": GGUFArchitecture("qwen3_moe", {**NORMED, **EXPERTS}, more=_qwen3_moe),
    "qwen3vlmoe": GGUFArchitecture("qwen3_moe", {**NORMED, **EXPERTS}, more=_qwen3_moe),
    "gemma": GGUFArchitecture("gemma", norm_offset_added=True),
    "gemma2": GGUFArchitecture("gemma2", GEMMA2, more=_gemma2, norm_offset_added=True),
    "gemma3": GGUFArchitecture("gemma3_text", GEMMA2, more=_gemma3, norm_offset_added=True),
    "gemma4": GGUFArchitecture("gemma4_text", GEMMA4, more=_gemma4, mixed=True, renamed=_no_experts),
    "phi2": GGUFArchitecture("phi", PHI, LAYER, partial=True),
    "phi3": GGUFArchitecture("phi3", {**GATE_UP, "attn_qkv": "self_attn.qkv_proj"}, more=_phi3, partial=True),
    "granite": GGUFArchitecture("granite", more=_granite, paired=True),
    "granitemoe": GGUFArchitecture("granitemoe", GRANITE_MOE, more=_granite_moe, paired=True),
    "olmo": GGUFArchitecture("olmo", more=_olmo, paired=True),
    "olmo2": GGUFArchitecture("olmo2", POSTED, more=_olmo2),
    "olmoe": GGUFArchitecture(
        "olmoe", {**NORMED, **EXPERTS}, more=lambda values: values.experts("num_experts", normalised=False)
    ),
    "starcoder2": GGUFArchitecture("starcoder2", FC, {"rms_norm_eps": "norm_epsilon"}),
    "gpt-oss": GGUFArchitecture("gpt_oss", GPT_OSS, more=_gpt_oss),
    "stablelm": GGUFArchitecture(
        "stablelm",
        {**LLAMA, "attn_q_norm": "self_attn.q_layernorm.norms.{}", "attn_k_norm": "self_attn.k_layernorm.norms.{}"},
        {**LAYER, "head_dim": ""}, _stablelm, partial=True,
    ),
    "command-r": GGUFArchitecture("cohere", NORMED, LAYER, _cohere),
    "cohere2": GGUFArchitecture("cohere2", LLAMA, {**LAYER, "head_dim": ""}, _cohere2),
    "glm4": GGUFArchitecture("glm4", GLM4, more=_glm4, partial=True),
    "chatglm": GGUFArchitecture("glm", GATE_UP, partial=True),
    "falcon": GGUFArchitecture(
        "falcon", FALCON,
        {"rms_norm_eps": "layer_norm_epsilon", "intermediate_size": "ffn_hidden_size", "head_dim": ""},
        _falcon, "transformer.", "h",
        renamed=lambda values: {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"} if values.has("attn_norm_2") else {},
    ),
    "gpt2": GGUFArchitecture("gpt2", GPT2, GPT2_KEYS, prefix="transformer.", layers="h"),
    "starcoder": GGUFArchitecture(
        "gpt_bigcode", GPT2, GPT2_KEYS, lambda values: {"multi_query": values.groups == 1}, "transformer.", "h"
    ),
    "gptneox": GGUFArchitecture(
        "gpt_neox", NEOX,
        {**LAYER, "head_dim": "", "partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
        lambda values: {"use_parallel_residual": bool(values.get("use_parallel_residual", True))}, "gpt_neox.",
        partial=True,
    ),
    "nemotron": GGUFArchitecture(
        "nemotron", LLAMA, {"rms_norm_eps": "norm_eps"}, norm_offset_added=True, partial=True
    ),
    "exaone4": GGUFArchitecture("exaone4", POSTED, more=_exaone4),
    "smollm3": GGUFArchitecture("smollm3", paired=True),
    "arcee": GGUFArchitecture("arcee", paired=True),
    "ernie4_5": GGUFArchitecture("ernie4_5"),
    "seed_oss": GGUFArchitecture("seed_oss", {**LLAMA, "post_attention_norm": "post_attention_layernorm"}),
    "lfm2": GGUFArchitecture("lfm2", LFM2, {"rms_norm_eps": "norm_eps"}, _lfm2),
    "lfm2moe": GGUFArchitecture("lfm2_moe", LFM2_MOE, {"rms_norm_eps": "norm_eps"}, _lfm2_moe),
    "granitehybrid": GGUFArchitecture(
        "granitemoehybrid", GRANITE_HYBRID, more=_granite_hybrid, paired=True, decays_stored=True
    ),
    "deepseek2": GGUFArchitecture("deepseek_v3", DEEPSEEK2, {"head_dim": ""}, _deepseek2, latent=True),
    "qwen35": GGUFArchitecture(
        "qwen3_5_text", QWEN35, more=_qwen35, norm_offset_added=True, decays_stored=True, value_heads_tiled=True,
        partial=True,
    ),
    "qwen35moe": GGUFArchitecture(
        "qwen3_5_moe_text", {**QWEN35, **EXPERTS}, more=_qwen35_moe, norm_offset_added=True, decays_stored=True,
        value_heads_tiled=True, partial=True,
    ),
    "hunyuan-dense": GGUFArchitecture(
        "hunyuan_v1_dense",
        {**LLAMA, "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
}  # fmt: skip
