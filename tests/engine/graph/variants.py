"""Tiny random models of every line of the graph engine's table, in every form that config.json can give it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from peerllm.engine.graph.describe import Described, describe
from peerllm.engine.graph.graph_shard import GraphShard
from peerllm.engine.graph.load import load_shard
from peerllm.engine.messages import LoadStage
from peerllm.engine.weights.checkpoint import read_tensors

CONTEXT, LAYERS, SLOTS = 224, 4, 3
SCALE = 2.0  # of matrices: every layer's part in the logits is large
SHAPES: tuple[dict[str, int], ...] = (  # (groups, heads and widths that are even and odd multiples of what is allowed)
    {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 101},
    {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 97},
    {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32, "vocab_size": 131},
    {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64},
)
WIDER = {"hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}  # than hidden / heads
ROTATED = {"rope_theta": 5000.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}
YARN = {"rope_parameters": {**ROTATED, "rope_type": "yarn", "factor": 4.0}}
LLAMA3 = {
    "rope_parameters": {
        **ROTATED, "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }
}  # fmt: skip
WINDOWS = {"sliding_window": 21, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BY_KIND = {
    "rope_parameters": {
        "full_attention": YARN["rope_parameters"], "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
}  # fmt: skip
GEMMA = {**WINDOWS, "query_pre_attn_scalar": 11}
GEMMA4_SHARED = {
    "sliding_window": 21, "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2, "global_head_dim": 40, "hidden_activation": "gelu", "vocab_size_per_layer_input": 200,
}  # fmt: skip
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.8, "attention_multiplier": 0.3}
LFM2 = {"layer_types": ["conv", "full_attention"] * 2}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 16,
}  # fmt: skip
DELTA_ALONE = {**DELTA, "layer_types": ["linear_attention"] * 4, "linear_num_value_heads": 2, "linear_key_head_dim": 12}
MAMBA = {
    "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": "auto",
    "mamba_chunk_size": 16,
}  # fmt: skip
HALF_ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16,
}  # fmt: skip
MLA_EVEN = {**MLA, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
ALONE = ({}, {})
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {  # by model type: what each of its variants sets
    "llama": (
        {}, {**LLAMA3, "attention_bias": True, "mlp_bias": True}, YARN, {**LINEAR, "tie_word_embeddings": True}, WIDER,
    ),
    "mistral": ({"sliding_window": 21}, {"sliding_window": None, **WIDER}),
    "ministral": (WINDOWS, {"sliding_window": 30}),
    "mixtral": (EXPERTS, {**EXPERTS, "sliding_window": 21}),
    "qwen2": ({}, {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 2}),
    "qwen2_moe": (
        {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
        {
            **EXPERTS, "shared_expert_intermediate_size": 40, "norm_topk_prob": True, "use_sliding_window": True,
            "sliding_window": 21, "max_window_layers": 3,
        },
    ),
    "qwen3": (
        {"attention_bias": True},
        {**WIDER, "use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1},
    ),
    "qwen3_moe": (
        {**EXPERTS, "decoder_sparse_step": 2},
        {**EXPERTS, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 21},
    ),
    "gemma": ({}, {**WIDER, "hidden_act": "gelu"}),
    "gemma2": (GEMMA, {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None}),
    "vaultgemma": (GEMMA,),
    "gemma3_text": (
        GEMMA, {**GEMMA, **BY_KIND}, {"sliding_window": 21, "sliding_window_pattern": 3, "rope_local_base_freq": 700.0},
    ),
    "phi": ({}, {"qk_layernorm": True}, {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 500.0}}),
    "phi3": ({}, {"sliding_window": 21}),
    "persimmon": ({}, {"qk_layernorm": False}),
    "gpt2": ({}, {"scale_attn_by_inverse_layer_idx": True, "n_inner": 56}, {"scale_attn_weights": False}),
    "gpt_bigcode": ({}, {"multi_query": False}),
    "gpt_neo": ({"num_layers": 4, "window_size": 21, "attention_types": [[["global", "local"], 2]]},),
    "gptj": ({"rotary_dim": 4}, {"rotary_dim": 8}),
    "opt": ({"ffn_dim": 56}, {"enable_bias": False, "tie_word_embeddings": False}),
    "gpt_neox": ({}, {"use_parallel_residual": False, "attention_bias": False, **LINEAR}),
    "falcon": (
        {"multi_query": True}, {"multi_query": False, "bias": True}, {"parallel_attn": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_size": 48, "num_attention_heads": 6},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 1},
    ),
    "stablelm": ({"use_qkv_bias": True}, {"use_parallel_residual": True}, {"qk_layernorm": True}),
    "starcoder2": ({"sliding_window": 21}, {"use_bias": False, "sliding_window": None, **LINEAR}),
    "cohere": ({}, {"use_qk_norm": True, "logit_scale": 2.0}),
    "cohere2": (WINDOWS, {"sliding_window": 21, "logit_scale": 1.5}),
    "olmo": ({}, {"clip_qkv": 1.0}),
    "olmo2": ALONE,
    "olmo3": (WINDOWS, {"sliding_window": 21, **BY_KIND}),
    "olmoe": (EXPERTS, {**EXPERTS, "norm_topk_prob": True}),
    "flex_olmo": (EXPERTS, {**EXPERTS, "norm_topk_prob": True}),
    "granite": (GRANITE, {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "granite_swa": ({**GRANITE, **WINDOWS}, {**GRANITE, "sliding_window": 21}),
    "granitemoe": ({**GRANITE, **EXPERTS}, {**EXPERTS, "attention_multiplier": 0.3}),
    "granitemoeshared": (
        {**GRANITE, **EXPERTS, "shared_intermediate_size": 24}, {**GRANITE, **EXPERTS, "shared_intermediate_size": 0},
    ),
    "glm": ({"attention_bias": True}, {"attention_bias": False, **WIDER}),
    "glm4": ({"attention_bias": True}, {"attention_bias": False, **LINEAR}),
    "smollm3": ({}, {"no_rope_layers": [0, 1, 0, 1], "use_sliding_window": True, "sliding_window": 21}),
    "exaone4": (
        {**WINDOWS, "sliding_window_pattern": 2}, {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    ),
    "gpt_oss": ({**EXPERTS, **WINDOWS}, {**EXPERTS, **WINDOWS, **WIDER, "swiglu_limit": 1.0, **LLAMA3}),
    "ernie4_5": ({}, {"use_bias": True, **WIDER}),
    "seed_oss": ({}, {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "hunyuan_v1_dense": (
        {}, {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 500.0}},
    ),
    "arcee": ({}, {"mlp_bias": True, **YARN}),
    "helium": ALONE,
    "nemotron": ({}, {"attention_bias": True, "mlp_bias": True}),
    "jais2": ({}, {"attention_bias": False, "mlp_bias": False}),
    "cwm": (WINDOWS, {"sliding_window": 21}),
    "internlm3": ({}, {"attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ALONE,
    "lfm2": (
        {**LFM2, "block_ff_dim": 48, "conv_L_cache": 4}, {**LFM2, "conv_bias": True, "block_multiple_of": 16},
        {"full_attn_idxs": [2], "block_auto_adjust_ff_dim": False, "tie_embedding": False},
    ),
    "lfm2_moe": (
        {**ROUTED, **LFM2, "num_dense_layers": 1, "routed_scaling_factor": 1.5},
        {**ROUTED, **LFM2, "use_expert_bias": False, "norm_topk_prob": False},
    ),
    "qwen3_5_text": (
        {**DELTA, **HALF_ROTATED, "tie_word_embeddings": True}, {**DELTA, **WIDER, "attention_bias": True}, DELTA_ALONE,
    ),
    "qwen3_5_moe_text": (
        {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 24},
        {**EXPERTS, **DELTA_ALONE, "shared_expert_intermediate_size": 40, "layer_types": None},
    ),
    "qwen3_next": (
        {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
        {
            **EXPERTS, **DELTA, **HALF_ROTATED, "shared_expert_intermediate_size": 24, "norm_topk_prob": False,
            "linear_num_value_heads": 2, "decoder_sparse_step": 2,
        },
    ),
    "granitemoehybrid": (
        {**GRANITE, **EXPERTS, **MAMBA, "shared_intermediate_size": 24},
        {
            **MAMBA, "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_head": "auto", "mamba_proj_bias": True,
            "num_local_experts": 0, "shared_intermediate_size": 24, "position_embedding_type": "rope",
        },
        {**EXPERTS, **MAMBA, "mamba_conv_bias": False, "shared_intermediate_size": 24, "attention_bias": True},
    ),
    "deepseek_v2": (
        {**ROUTED, **MLA, "routed_scaling_factor": 1.7, "attention_bias": True, "mlp_bias": True},
        {**ROUTED, **MLA_EVEN, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    ),
    "deepseek_v3": (
        {**ROUTED, **MLA, "n_group": 3, "topk_group": 2},
        {**ROUTED, **MLA_EVEN, "n_group": 2, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
        {
            **ROUTED, **MLA, "n_group": 1, "topk_group": 1,
            "rope_parameters": {**YARN["rope_parameters"], "mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "glm4_moe_lite": (
        {**ROUTED, **MLA, "n_group": 1}, {**ROUTED, **MLA_EVEN, "mlp_layer_types": ["sparse", "dense"] * 2},
    ),
    "youtu": (MLA, {**MLA_EVEN, "rope_interleave": False, "tie_word_embeddings": False}),
    "minicpm3": (MLA, {**MLA_EVEN, "v_head_dim": None, "scale_depth": None, "dim_model_base": None, "scale_emb": 3}),
    "hyperclovax": ({**GRANITE, "attention_multiplier": None}, {**GRANITE, "use_post_norm": False}),
    "gemma4_text": (
        {**WINDOWS, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 150},
        {**WINDOWS, **GEMMA4_SHARED, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 16},
        {**GEMMA4_SHARED, "final_logit_softcapping": 3.0, "hidden_size_per_layer_input": 24},
        {
            **WINDOWS, "global_head_dim": 24, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A model's description, its two shards, and for sequences of token ids [SLOTS, CONTEXT] their logits.

    `states`: what the matrix of the head is given of the first sequence.
    """

    described: Described
    shards: tuple[GraphShard, GraphShard]
    ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    states: npt.NDArray[np.float32]


def config_of(model_type: str, **values: Any) -> Any:
    """The configuration as transformers completes it."""
    from transformers import AutoConfig

    quiet = {f"{kind}_token_id": None for kind in ("eos", "pad")}
    return AutoConfig.for_model(model_type, **copy.deepcopy({**quiet, **values}))  # they add to what they are given


def model_of(model_type: str, number: int, values: dict[str, Any]) -> Any:
    """A random model whose every tensor matters: norms are not ones, biases not zeros."""
    from transformers import AutoModelForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS, "intermediate_size": 56, "max_position_embeddings": CONTEXT}
    shape = SHAPES[number % len(SHAPES)]
    if model_type == "falcon" or "kv_lora_rank" in values:  # they count the width themselves
        shape = {key: value for key, value in shape.items() if key != "head_dim"}
    if "kv_lora_rank" in values:
        shape["num_key_value_heads"] = shape["num_attention_heads"]
    config = config_of(model_type, **{**sizes, **shape, **values})
    torch.manual_seed(number)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape)
            if tensor.dim() < 2 or min(tensor.shape[-2:]) == 1:
                tensor.add_((0.4 if name.endswith("weight") else 0.1) * noise)
            else:
                tensor.copy_(noise * (1.0 if "embed" in name or "wte" in name else SCALE / tensor.shape[-1] ** 0.5))
        for name, tensor in model.named_buffers():
            if name.endswith(("expert_bias", "correction_bias")):  # by which experts are chosen
                tensor.add_(0.3 * torch.randn(tensor.shape))
    return model


def make(model_type: str, number: int, values: dict[str, Any], directory: Path) -> Made:
    """Save the model as transformers does and load it as two shards, cut at a place that `number` picks."""
    model = model_of(model_type, number, values)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(directory)
    ids = np.random.default_rng(number).integers(0, model.config.vocab_size, (SLOTS, CONTEXT))
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
        states = model.base_model(torch.from_numpy(ids[:1]), use_cache=False)[0][0].numpy()
    described = describe(json.loads((directory / "config.json").read_text()))
    last = len(described.model.units) + 1
    cut = number % last
    spans = (0, cut), (cut + 1, last)
    both = load(described, directory, *spans[0]), load(described, directory, *spans[1])
    return Made(described, both, ids, logits, states)


def load(described: Described, directory: Path, first: int, last: int) -> GraphShard:
    spec = LoadStage(
        request=0, deployment="d", epoch=1, stage=0, stages=1, first_layer=first, last_layer=last, config="",
        tensors=tuple(read_tensors(directory).values()), dtype="float32", slots=SLOTS, context=CONTEXT, chunk=32,
        micro_batch=SLOTS, upstream=None, downstream=None, head_device="",
    )  # fmt: skip
    return load_shard(described, spec, 1, lambda done, total: None)
