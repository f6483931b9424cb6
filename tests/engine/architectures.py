"""Tiny random models of every family, divided every way into two and three shards and compared with the whole model.

`python -m tests.engine.architectures --write docs/architectures.md` runs it all and writes the table.
Tiny random models tend to repeat one token whatever their layers do, so each has negative controls: skipping any one
block, permuting positions and dropping the final norm must each change the tokens. The initial scale is raised until
they do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peerllm.engine.backends import Backends
from peerllm.engine.base import Backend, Shard
from peerllm.engine.graph.config_values import UnfitError
from peerllm.engine.graph.describe import describe, family_of
from peerllm.engine.graph.graph_shard import GraphShard
from peerllm.engine.messages import Inspect, Inspected, LoadStage
from peerllm.engine.model.torch_backend import TorchBackend
from peerllm.transport.frames.token_run import TokenRun
from tests.engine.quantising import quantise
from tests.engine.runs import in_slot

VOCABULARY, PROMPT, ANSWER, CONTEXT = 101, 9, 8, 32
SCALES = (1.0, 1.6, 2.5, 4.0, 6.0)
SEEDS = (0, 1, 2, 3)
DISTINCT = 3  # tokens that an answer must hold to be worth comparing
TOLERANCE = 1e-4
LAYERS = 6  # embedding, four blocks, head
SLOTS = 3  # sequences that step together
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
MLA: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4,
}  # fmt: skip
LLAMA4: dict[str, Any] = {
    **EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 6, "no_rope_layers": [1, 1, 1, 0],
    "interleave_moe_layer_step": 2,
}  # fmt: skip
SHARED: dict[str, Any] = {  # four blocks that are one layer to cut at
    "num_hidden_layers": 7, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention",
        "sliding_attention", "full_attention"],
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    **WINDOWS, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA3N: dict[str, Any] = {
    **GEMMA4, "altup_num_inputs": 3, "laurel_rank": 4,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
MROPE = {"rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
UNPLACED = "attention without positions: the control permutes the prompt instead"
ALIBI = "no positions reach a layer: the control permutes the prompt instead"


Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Answer = tuple[list[int], list[Floats]]  # greedy tokens, and the logits [vocabulary] of each
Forward = Callable[[npt.NDArray[Any], Sequence[TokenRun]], npt.NDArray[Any]]
Cut = tuple[tuple[int, int], ...]  # first and last layer of each shard


@dataclass(frozen=True)
class Family:
    """A model type and the numbers that make it tiny."""

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()  # of COMMON, what the configuration class does not take
    positions: bool = True  # False: the control permutes the prompt
    norm: bool = True  # False: there is no final norm
    note: str = ""
    beside: dict[str, Any] | None = None  # of a wrapper: what stands beside its language model in config.json
    quantised: str = ""  # by which method its files are, see quantising.quantise
    by_hand: bool = False  # the wrapper's files are written here, not by transformers


FAMILIES = [
    Family("Llama", "llama"),
    Family("Mistral", "mistral", {"sliding_window": 5}, note="every layer windowed"),
    Family("Mixtral", "mixtral", EXPERTS, note="experts"),
    Family("Ministral", "ministral", WINDOWS, note="windows"),
    Family("Qwen2", "qwen2"),
    Family(
        "Qwen2-MoE",
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
        note="experts, one dense layer",
    ),
    Family("Qwen3", "qwen3"),
    Family("Qwen3-MoE", "qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}, note="experts in every second layer"),
    Family(
        "Qwen3-Next",
        "qwen3_next",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "partial_rotary_factor": 0.5,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
        note="recurrent layers, experts",
    ),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", {**WINDOWS, "query_pre_attn_scalar": 8}, note="windows, soft caps"),
    Family("Gemma 3 (text)", "gemma3_text", {**WINDOWS, "query_pre_attn_scalar": 8}, note="windows"),
    Family("VaultGemma", "vaultgemma", {**WINDOWS, "query_pre_attn_scalar": 8}, note="windows"),
    Family("Phi", "phi", {"partial_rotary_factor": 0.5}),
    Family("Phi-3", "phi3"),
    Family("Phi-3.5-MoE", "phimoe", EXPERTS, note="experts"),
    Family("GPT-2", "gpt2", {"n_inner": 48, "scale_attn_by_inverse_layer_idx": True}, note="attention scaled by layer"),
    Family("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family(
        "OPT (350m layout)",
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        norm=False,
        note="projected embedding; no final norm",
    ),
    Family("GPT-NeoX", "gpt_neox"),
    Family("GPT-NeoX (Japanese)", "gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    Family(
        "GPT-Neo",
        "gpt_neo",
        {"num_layers": 4, "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 2]]},
        note="windows by mask",
    ),
    Family("GPT-J", "gptj", {"rotary_dim": 4}),
    Family("GPT-BigCode", "gpt_bigcode", {"n_inner": 48}),
    Family("CodeGen", "codegen", {"rotary_dim": 4}),
    Family("BLOOM", "bloom", {"n_layer": 4, "n_head": 4}, positions=False, note=ALIBI),
    Family(
        "MPT",
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64, "expansion_ratio": 2},
        positions=False,
        note=ALIBI,
    ),
    Family("Falcon", "falcon", {"multi_query": True, "new_decoder_architecture": False}, without=("head_dim",)),
    Family(
        "Falcon (ALiBi)",
        "falcon",
        {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
        without=("head_dim",),
        positions=False,
        note=ALIBI,
    ),
    Family("StableLM", "stablelm", {"partial_rotary_factor": 0.5}),
    Family("StarCoder2", "starcoder2", {"sliding_window": 5}, note="every layer windowed"),
    Family("Cohere", "cohere"),
    Family("Cohere 2", "cohere2", WINDOWS, note="windows; full layers without rotation"),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", WINDOWS, note="windows"),
    Family("OLMoE", "olmoe", EXPERTS, note="experts"),
    Family("FlexOLMo", "flex_olmo", EXPERTS, note="experts"),
    Family("Granite", "granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.8}),
    Family("Granite-MoE", "granitemoe", EXPERTS, note="experts"),
    Family("Granite-MoE (shared)", "granitemoeshared", {**EXPERTS, "shared_intermediate_size": 16}, note="experts"),
    Family("GLM", "glm", {"partial_rotary_factor": 0.5}),
    Family("GLM-4", "glm4", {"partial_rotary_factor": 0.5}),
    Family(
        "GLM-4-MoE",
        "glm4_moe",
        {**EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        note="experts, first layer dense",
    ),
    Family("SmolLM3", "smollm3", {"no_rope_layers": [1, 0, 1, 1]}, note="a layer without rotation"),
    Family(
        "EXAONE 4", "exaone4", {**WINDOWS, "sliding_window_pattern": 2}, note="windows; full layers without rotation"
    ),
    Family("ERNIE 4.5", "ernie4_5"),
    Family(
        "ERNIE 4.5-MoE",
        "ernie4_5_moe",
        {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
        note="experts, first layer dense",
    ),
    Family(
        "DeepSeek-V2",
        "deepseek_v2",
        {**MLA, **EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        note="latent attention, experts, first layer dense",
    ),
    Family(
        "DeepSeek-V3",
        "deepseek_v3",
        {**MLA, **EXPERTS, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        note="latent attention, experts, first layer dense",
    ),
    Family(
        "dots.llm1",
        "dots1",
        {**EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **WINDOWS, "n_shared_experts": 1},
        note="windows, experts, first layer dense",
    ),
    Family("gpt-oss", "gpt_oss", {**EXPERTS, **WINDOWS}, note="windows, sinks, experts"),
    Family("Helium", "helium"),
    Family("Nemotron", "nemotron", {"partial_rotary_factor": 0.5}),
    Family(
        "JetMoE", "jetmoe", {**EXPERTS, "kv_channels": 8, "num_key_value_heads": 2}, note="experts, also in attention"
    ),
    Family(
        "DBRX",
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
        note="experts",
    ),
    Family("Seed-OSS", "seed_oss"),
    Family("Hunyuan (dense)", "hunyuan_v1_dense"),
    Family("Hunyuan (MoE)", "hunyuan_v1_moe", {**EXPERTS, "moe_topk": 2}, note="experts"),
    Family("Arcee", "arcee"),
    Family("Apertus", "apertus"),
    Family("BitNet", "bitnet"),
    Family("MiniMax-M2", "minimax_m2", {**EXPERTS, "rotary_dim": 4}, note="experts"),
    Family("Persimmon", "persimmon", {"partial_rotary_factor": 0.5}),
    Family("XGLM", "xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4}),
    Family("BioGPT", "biogpt"),
    Family("DiffLlama", "diffllama", note="a constant that grows with the layer's number"),
    Family("Doge", "doge"),
    Family(
        "LFM2",
        "lfm2",
        {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48, "conv_L_cache": 3},
        note="convolution layers",
    ),
    Family("Youtu", "youtu", MLA, note="latent attention"),
    Family("Jais 2", "jais2"),
    Family("CWM", "cwm", WINDOWS, without=("bos_token_id",), note="windows"),
    Family(
        "nanochat",
        "nanochat",
        norm=False,
        note="the final norm has no weights and no centring, so dropping it cannot change greedy tokens",
    ),
    Family("AFMoE", "afmoe", {**EXPERTS, **WINDOWS, "num_dense_layers": 1}, note="windows, experts, first layer dense"),
    Family("Solar Open", "solar_open", {**EXPERTS, "n_group": 1, "topk_group": 1}, note="experts"),
    Family(
        "ModernBERT (decoder)",
        "modernbert-decoder",
        {
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            **{f"{k}_token_id": 0 for k in ("pad", "bos", "cls", "sep")},
        },
        note="windows",
    ),
    Family("Ministral 3", "ministral3"),
    Family("Qwen3.5 (text)", "qwen3_5_text", LINEAR, note="recurrent layers"),
    Family(
        "Qwen3.5-MoE (text)",
        "qwen3_5_moe_text",
        {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16},
        note="recurrent layers, experts",
    ),
    Family("Granite (windows)", "granite_swa", WINDOWS, note="windows"),
    Family(
        "Granite hybrid",
        "granitemoehybrid",
        {**EXPERTS, **MAMBA, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"] * 2},
        positions=False,
        note=f"recurrent layers, experts; {UNPLACED}",
    ),
    Family("Bamba", "bamba", {**MAMBA, "attn_layer_indices": [1, 3]}, note="recurrent layers"),
    Family("Falcon-H1", "falcon_h1", {**MAMBA, "mamba_d_ssm": 64}, note="attention and recurrence in every layer"),
    Family(
        "Nemotron-H",
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
        positions=False,
        note=f"recurrent layers; {UNPLACED}",
    ),
    Family(
        "LFM2-MoE",
        "lfm2_moe",
        {**EXPERTS, "layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "num_dense_layers": 1},
        note="convolution layers, experts",
    ),
    Family(
        "Llama 4 (text)",
        "llama4_text",
        LLAMA4,
        note="attention in chunks, experts, a layer without rotation",
    ),
    Family("OLMo hybrid", "olmo_hybrid", LINEAR, note="recurrent layers"),
    Family(
        "EXAONE-MoE",
        "exaone_moe",
        {**EXPERTS, **WINDOWS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        note="windows, experts, first layer dense",
    ),
    Family(
        "GLM-4-MoE-lite",
        "glm4_moe_lite",
        {**EXPERTS, **MLA, "n_group": 1, "topk_group": 1},
        note="latent attention, experts",
    ),
    Family("Cohere 2-MoE", "cohere2_moe", {**EXPERTS, **WINDOWS}, note="windows, experts"),
    Family("Hunyuan 3", "hy_v3", EXPERTS, note="experts"),
    Family("Mellum", "mellum", {**EXPERTS, **WINDOWS}, note="windows, experts"),
    Family("MiMo-V2-Flash", "mimo_v2_flash", {**EXPERTS, **WINDOWS}, note="windows, experts"),
    Family("InternLM3", "internlm3"),
    Family("MiniCPM3", "minicpm3", MLA, note="latent attention"),
    Family("HyperCLOVA X", "hyperclovax"),
    Family("IQuest-Coder", "iquestcoder"),
    Family("GPT-SW3", "gpt-sw3"),
    Family("Laguna", "laguna", {**EXPERTS, **WINDOWS}, note="windows, experts"),
    Family("Gemma 4 (text)", "gemma4_text", GEMMA4, note="windows, heads of two widths, inputs for each layer"),
    Family(
        "Gemma 4 (shared keys)",
        "gemma4_text",
        {**GEMMA4, **SHARED, "use_double_wide_mlp": True},
        note="as above; the last four blocks share keys and values and are one layer to cut at",
    ),
    Family(
        "Gemma 4 (dense)",
        "gemma4_text",
        {**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        note="windows, heads of two widths, keys as values",
    ),
    Family(
        "Gemma 4 (experts)",
        "gemma4_text",
        {
            **GEMMA4, **EXPERTS, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2,
            "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        },
        note="windows, heads of two widths, keys as values, experts beside a dense feed-forward",
    ),
    Family(
        "Gemma 3n (text)",
        "gemma3n_text",
        {**GEMMA3N, **SHARED, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]},
        note="windows, three streams, inputs for each layer; the last four blocks share keys and values",
    ),
    Family(
        "Gemma 3n", "gemma3n", {**GEMMA3N, **SHARED, "model_type": "gemma3n_text"}, beside={}, by_hand=True,
        note="the language model (`gemma3n_text`), put beside other tensors by hand (its vision model needs `timm`)",
    ),
    *(
        Family(name, kind, {**config, "model_type": text}, note=f"the language model (`{text}`) beside a vision model",
            beside={"vision_config": {**VISION, **vision}, "image_token_id": 2, "image_token_index": 2, **outer})
        for name, kind, text, config, vision, outer in [
            ("Gemma 3", "gemma3", "gemma3_text", {**WINDOWS, "query_pre_attn_scalar": 8},
                {"model_type": "siglip_vision_model"}, {"mm_tokens_per_image": 4}),
            ("Mistral 3", "mistral3", "mistral", {"sliding_window": 5}, {"model_type": "pixtral"}, {}),
            ("Mistral 3 (Ministral)", "mistral3", "ministral3", {}, {"model_type": "pixtral"}, {}),
            ("LLaVA", "llava", "llama", {}, {"model_type": "clip_vision_model"}, {}),
            ("LLaVA-NeXT", "llava_next", "mistral", {}, {"model_type": "clip_vision_model"}, {}),
            ("SmolVLM", "smolvlm", "llama", {}, {}, {"scale_factor": 1}),
            ("Idefics 3", "idefics3", "llama", {}, {}, {"scale_factor": 1}),
            ("InternVL", "internvl", "qwen2", {}, {}, {}),
            ("Qwen2-VL", "qwen2_vl", "qwen2_vl_text", MROPE, {"embed_dim": 16, "hidden_size": 32, "depth": 1}, {}),
            ("Qwen2.5-VL", "qwen2_5_vl", "qwen2_5_vl_text", MROPE,
                {"out_hidden_size": 32, "depth": 1, "fullatt_block_indexes": [0]}, {}),
            ("Qwen3-VL", "qwen3_vl", "qwen3_vl_text",
                {"rope_parameters": {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_type": "default"}},
                {"out_hidden_size": 32, "depth": 1, "deepstack_visual_indexes": [0]}, {}),
            ("Qwen3.5", "qwen3_5", "qwen3_5_text", LINEAR, {"out_hidden_size": 32, "depth": 1}, {}),
            ("Qwen3.5-MoE", "qwen3_5_moe", "qwen3_5_moe_text",
                {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}, {"out_hidden_size": 32, "depth": 1}, {}),
            ("Gemma 4", "gemma4", "gemma4_text", {**GEMMA4, **SHARED, "pad_token_id": 0},
                {"head_dim": 8, "num_key_value_heads": 2}, {"audio_config": None}),
            ("Gemma 4 (unified)", "gemma4_unified", "gemma4_unified_text",
                {**WINDOWS, "global_head_dim": 16, "pad_token_id": 0}, {"num_soft_tokens": 4}, {"audio_config": None}),
            ("Llama 4", "llama4", "llama4_text", LLAMA4, {"vision_output_dim": 16, "projector_input_dim": 16,
                "projector_output_dim": 16}, {}),
        ]
    ),
]  # fmt: skip
QUANTISED = {  # methods of weights.packers, and MXFP4
    "Llama": ("GPTQ 4 bits, in order of activations", "GPTQ 8 bits, zeros, groups of 48", "AWQ",
              "compressed-tensors 4 bits, zeros", "compressed-tensors int8", "FP8, small tiles"),
    "Qwen2": ("GPTQ 4 bits, zeros",),
    "Qwen3": ("AWQ, rows", "FP8"),
    "Gemma 2": ("compressed-tensors FP8, one scale",),
    "Gemma 3": ("compressed-tensors 4 bits",),
    "Phi-3": ("GPTQ 4 bits, zeros, format 2",),
    "GPT-NeoX": ("GPTQ 8 bits, in order of activations",),
    "Mixtral": ("AWQ",),
    "Qwen2-MoE": ("GPTQ 8 bits, rows",),
    "Qwen3-MoE": ("GPTQ 4 bits", "compressed-tensors FP8"),
    "gpt-oss": ("MXFP4",),
}  # fmt: skip
FAMILIES += [
    replace(
        family, name=f"{family.name}: {method}", quantised=method,
        config={**family.config, **({"intermediate_size": 64} if method == "MXFP4" else {})},
        note="; ".join(filter(None, [family.note, "quantized"])),
    )
    for family in FAMILIES for method in QUANTISED.get(family.name, ())
]  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A family's tiny model on disk, and what the whole of it answers to a prompt."""

    family: Family
    directory: Path
    prompt: Ids  # [PROMPT]
    tokens: list[int]
    logits: list[Floats]
    inspected: Inspected
    scale: float
    blind: list[str]  # controls that changed nothing: empty, or comparing with the answer shows little

    @property
    def layers(self) -> int:
        return len(self.inspected.profile.layers)

    @property
    def blocks(self) -> int:
        return int(self.family.config.get("num_hidden_layers", LAYERS - 2))


@dataclass
class Outcome:
    """What the test found for one family."""

    family: Family
    by: str = ""  # "graph", or "torch" and why
    blocks: int = 0
    cuts: int = 0
    equal: int = 0
    difference: float = 0.0
    scale: float = 0.0
    distinct: int = 0
    controls: str = ""
    error: str = ""
    together_equal: bool = False
    together_difference: float = 0.0
    torch_equal: bool = True
    torch_difference: float = 0.0  # of one cut through torch, where the graph engine computes all others

    @property
    def passed(self) -> bool:
        equal = self.cuts > 0 and self.equal == self.cuts and self.together_equal and self.torch_equal
        largest = max(self.difference, self.together_difference, self.torch_difference)
        return not self.error and equal and largest <= TOLERANCE


def tiny_model(family: Family, scale: float, seed: int) -> Any:
    """A random model whose every tensor matters: norms are not ones, biases not zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    values = {key: value for key, value in COMMON.items() if key not in family.without} | family.config
    alone = family.beside is None or family.by_hand
    values = values if alone else {**family.beside, "text_config": values}
    config = AutoConfig.for_model(values.pop("model_type", family.model_type), **values)
    torch.manual_seed(seed)
    kind: Any = AutoModelForCausalLM if alone else AutoModelForImageTextToText
    model = kind.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        scalars = [(name, tensor) for name, tensor in model.named_buffers() if name.endswith("layer_scalar")]
        for name, tensor in [*model.named_parameters(), *scalars]:
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() >= 2 and min(tensor.shape[-2:]) > 1:
                fan_in = tensor.shape[-1]
                tensor.copy_(noise * (scale if "embed" not in name and "wte" not in name else 1.0) / fan_in**0.5)
            elif name.endswith("weight"):
                tensor.copy_(tensor + 0.4 * noise)
            else:
                tensor.add_(0.1 * noise)
    return model


def save(model: Any, directory: Path, quantised: str = "") -> Any:
    """Write a model's files, quantized by a method if one is named, and read back what they mean."""
    model.save_pretrained(directory)
    meant = directory
    if quantised:
        meant = directory / "floats"
        quantise(directory, quantised, meant)
    return type(model).from_pretrained(meant, dtype=torch.float32).eval()


def wrap(family: Family, directory: Path) -> None:
    """Turn a language model's files into those of a wrapper, with a tensor of another part among them."""
    config = json.loads((directory / "config.json").read_text())
    outer = {"model_type": family.model_type, "text_config": config, "vision_config": {"hidden_size": 16}}
    (directory / "config.json").write_text(json.dumps(outer))
    tensors = load_file(directory / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file({**named, "model.vision_tower.norm.weight": torch.ones(16)}, directory / "model.safetensors")


def inspect(directory: Path, backend: Backend | None = None, quantize: str = "auto") -> Inspected:
    """Of float32; by whatever would compute it, or by `backend`."""
    return (backend or Backends()).inspect(Inspect(1, str(directory), "float32", quantize))


def stage(inspected: Inspected, first: int, last: int, slots: int = 1, context: int = CONTEXT) -> LoadStage:
    """The order to load layers first..last."""
    tensors = tuple(tensor for layer in inspected.tensors[first : last + 1] for tensor in layer)
    return LoadStage(
        1, "0" * 32, 1, 0, 1, first, last, inspected.config, tensors, inspected.dtype, slots, context, 16, 4,
        None, None, "0" * 64, quantize=inspected.quantize,
    )  # fmt: skip


def load(inspected: Inspected, cut: Cut, backend: Backend | None = None) -> list[Shard]:
    """The shards of a cut, by whatever would compute them or by `backend`."""
    backend = backend or Backends()
    return [backend.load(stage(inspected, *part, slots=SLOTS), lambda done, total: None) for part in cut]


def computed_by(inspected: Inspected) -> str:
    """ "graph", or "torch" and why."""
    try:
        describe(json.loads(inspected.config))
    except UnfitError as error:
        known = family_of(json.loads(inspected.config)) is not None
        return f"torch: {error if known else 'not in the table'}"
    return "graph"


def generate(forwards: Sequence[Forward], prompt: Ids, chunks: tuple[int, ...]) -> Answer:
    """Greedy tokens and logits of each step, hidden states passed from shard to shard."""
    tokens: list[int] = []
    logits: list[Floats] = []
    position, pieces = 0, np.split(prompt, np.cumsum(chunks)[:-1])
    while len(tokens) < ANSWER:
        carried: npt.NDArray[Any] = pieces.pop(0)
        each = in_slot(0, position, len(carried), not pieces)
        position += len(carried)
        for forward in forwards:
            carried = forward(carried, [each])
        if not pieces:
            logits.append(carried[0].copy())
            tokens.append(int(carried[0].argmax()))
            pieces.append(np.array(tokens[-1:]))
    return tokens, logits


def generate_together(shards: Sequence[Shard], prompts: Sequence[Ids], chunk: int) -> list[Answer]:
    """As `generate`, for several sequences: a chunk of a prompt, then a batch of steps of all that have read theirs.

    They come in another order than their slots', and every batch of steps has another order than the one before.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Floats]] = [[] for _ in prompts]
    held = [0] * len(prompts)

    def run(ids: npt.NDArray[Any], runs: list[TokenRun]) -> None:
        for shard in shards:
            ids = shard.forward(ids, runs)
        for each in runs:
            held[each.slot] += each.length
        for each, row in zip([one for one in runs if one.sample], ids, strict=False):
            logits[each.slot].append(row.copy())
            tokens[each.slot].append(int(row.argmax()))

    waiting = [
        (slot, prompts[slot][start : start + chunk])
        for slot in (2, 0, 1)
        for start in range(0, len(prompts[slot]), chunk)
    ]
    orders = itertools.cycle(itertools.permutations(range(len(prompts))))
    while any(len(said) < ANSWER for said in tokens):
        if waiting:
            slot, piece = waiting.pop(0)
            run(piece, [in_slot(slot, held[slot], len(piece), held[slot] + len(piece) == len(prompts[slot]))])
        if ready := [slot for slot in next(orders) if 0 < len(tokens[slot]) < ANSWER]:
            run(np.array([tokens[slot][-1] for slot in ready]), [in_slot(slot, held[slot], 1, True) for slot in ready])
    return list(zip(tokens, logits, strict=True))


def reference(model: Any, prompt: Ids) -> Answer:
    """What transformers' own generate says."""
    out = model.generate(
        torch.from_numpy(prompt).unsqueeze(0), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=ANSWER, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), [row[0].float().numpy() for row in out.logits]


def controls(inspected: Inspected, model: Any, prompt: Ids, tokens: list[int], family: Family) -> list[str]:
    """The names of those controls that failed to change the tokens, or of what changed them by itself."""
    last = len(inspected.profile.layers) - 1
    graph = computed_by(inspected) == "graph"  # then each layer is a shard of its own, and can be left out
    parts = tuple((n, n) for n in range(last + 1)) if graph else ((0, last - 1), (last, last))
    shards: list[Any] = load(inspected, parts)
    chain = [shard.forward for shard in shards]
    blind = []

    def same(forwards: Sequence[Forward], given: Ids = prompt) -> bool:
        return generate(forwards, given, (len(given),))[0] == tokens

    def without(after: Shard) -> Forward:
        """In place of a layer: what it hands on is what came in, but for what it alone reads."""
        width, read = inspected.hidden_size, after.hidden_size - inspected.hidden_size
        return lambda rows, runs: np.concatenate([rows[:, :width], rows[:, rows.shape[1] - read :]], axis=1)

    def head_alone(hidden: npt.NDArray[Any], runs: Sequence[TokenRun]) -> npt.NDArray[Any]:
        matrix = model.get_output_embeddings()
        with torch.inference_mode():  # of several streams the first one
            logits: npt.NDArray[Any] = matrix(torch.from_numpy(hidden[-1:, : matrix.in_features])).numpy()
            return logits

    if not same(chain):
        blind.append("nothing is changed")
    for number in range(last - 1 if graph else len(shards[0].blocks)):
        if graph:
            skipped = same([*chain[: number + 1], without(shards[number + 2]), *chain[number + 2 :]])
        else:
            hook = shards[0].blocks[number].register_forward_hook(skip, with_kwargs=True, prepend=True)
            skipped = same(chain)
            hook.remove()
        if skipped:
            blind.append(f"skip block {number}")
    if family.norm and same([*chain[:-1], head_alone]):
        blind.append("drop the final norm")
    if not family.positions:
        if same(chain, np.concatenate([prompt[-2::-1], prompt[-1:]])):
            blind.append("permute the prompt")
        return blind
    for shard in shards:
        permute_positions(shard)
    if same(chain):
        blind.append("permute positions")
    return blind


def skip(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A hook: the block's hidden states are those that came in."""
    hidden = args[0] if args else next(iter(kwargs.values()))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def permute_positions(shard: Any) -> None:
    """From now on the tokens of a chunk stand in the opposite order."""
    if isinstance(shard, GraphShard):
        blocks = shard._blocks
        shard._blocks = lambda rows, places, batch: blocks(rows, places[:, ::-1], batch)  # type: ignore[method-assign]
    else:
        positions = shard.positions
        shard.positions = lambda each: positions(each).flip(0)


def example(family: Family, directory: Path) -> Example:
    """Make and save a model of the family that every control bites on, if there is one among scales and seeds."""
    for number, (scale, seed) in enumerate(itertools.product(SCALES, SEEDS)):
        place = directory / str(number)
        model = save(tiny_model(family, scale, seed), place, family.quantised)
        prompt = torch.randint(3, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(seed + 7)).numpy()
        tokens, logits = reference(model, prompt)
        if family.by_hand:
            wrap(family, place)
        inspected = inspect(place)
        blind = ["answer of one token"]
        if len(set(tokens)) >= DISTINCT:
            blind = controls(inspected, model, prompt, tokens, family)
        if not blind:
            break
    return Example(family, place, prompt, tokens, logits, inspected, scale, blind)


def cuts(layers: int, pieces: int) -> list[Cut]:
    """Every way to cut layers 0..layers - 1 into that many shards: (first, last) of each."""
    places = itertools.combinations(range(1, layers), pieces - 1)
    return [tuple((a, b - 1) for a, b in itertools.pairwise((0, *cut, layers))) for cut in places]


def every_cut(layers: int = LAYERS) -> list[Cut]:
    """Into two and into three shards."""
    return [*cuts(layers, 2), *cuts(layers, 3)]


def share(number: int) -> list[Cut]:
    """One cut into two and one into three for the family of that number: places wander over the table, each its way."""
    two = cuts(LAYERS, 2)[number % 5]
    threes = [three for three in cuts(LAYERS, 3) if set(three) & set(two)]  # a shard of both is loaded once
    return [two, threes[number // 5 % len(threes)]]


def examine(made: Example, chosen: Sequence[Cut] | None = None, torch_too: Cut | None = None) -> Outcome:
    """Divide a model every way into two and three, or as chosen, and compare.

    `torch_too`: what of the graph engine's models torch computes as well.
    """
    family, outcome = made.family, Outcome(made.family, computed_by(made.inspected))
    outcome.scale, outcome.distinct = made.scale, len(set(made.tokens))
    if made.blind:
        outcome.error = f"controls that change nothing: {', '.join(made.blind)}"
        return outcome
    outcome.blocks = made.blocks
    skips = f"{made.blocks} skips"
    order = "positions" if family.positions else "prompt order"
    outcome.controls = ", ".join([skips, order, *(["final norm"] if family.norm else [])])
    shards: dict[tuple[int, int], Shard] = {}
    every = every_cut(made.layers) if chosen is None else chosen
    for cut in every:
        new = tuple(set(cut) - shards.keys())
        shards.update(zip(new, load(made.inspected, new), strict=True))
        tokens, away = compare(made, [shards[part] for part in cut])
        outcome.cuts += 1
        outcome.equal += tokens
        outcome.difference = max(outcome.difference, away)
    if {isinstance(shard, GraphShard) for shard in shards.values()} != {outcome.by == "graph"}:
        outcome.error = f"not computed by {outcome.by}"
    examine_together(made, [shards[part] for part in every[len(every) // 2]], outcome)
    if outcome.by == "graph" and torch_too is not None and not family.quantised:
        backend = TorchBackend()
        loaded = load(inspect(made.directory, backend), torch_too, backend)
        outcome.torch_equal, outcome.torch_difference = compare(made, loaded)
    return outcome


def compare(made: Example, shards: Sequence[Shard]) -> tuple[bool, float]:
    """Whether the tokens are the whole model's, and the largest difference of logits."""
    chunks = (PROMPT,) if len(shards) == 2 else (4, PROMPT - 4)
    tokens, logits = generate([shard.forward for shard in shards], made.prompt, chunks)
    return tokens == made.tokens, difference(logits, made.logits)


def examine_together(made: Example, shards: Sequence[Shard], outcome: Outcome) -> None:
    """Three sequences that come one after the other and then step in one batch, against each alone."""
    prompts = [made.prompt[-3::-1].copy(), made.prompt, (made.prompt * 7 + 11) % VOCABULARY]
    alone = [generate([shard.forward for shard in shards], prompt, (len(prompt),)) for prompt in prompts]
    alone[1] = made.tokens, made.logits
    together = generate_together(shards, prompts, 5)
    outcome.together_equal = [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
    pairs = zip(together, alone, strict=True)
    outcome.together_difference = max(difference(got, want) for (_, got), (_, want) in pairs)


def difference(some: list[Floats], others: list[Floats]) -> float:
    """The largest between the logits [vocabulary] of each step."""
    return float(np.abs(np.stack(some) - np.stack(others)).max())


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a page of documentation."""
    good = [outcome for outcome in outcomes if outcome.passed]
    kinds = {outcome.family.model_type for outcome in good}
    graphs = sum(outcome.by == "graph" for outcome in good)
    lines = [
        "# Architectures",
        "",
        "Written by `python -m tests.engine.architectures --write docs/architectures.md`; do not edit by hand.",
        "",
        f"{len(good)} of {len(outcomes)} variants ({len(kinds)} model types) passed, {graphs} of them computed by the",
        "graph engine and the others by torch. Each is a tiny random model, saved as safetensors, inspected, loaded",
        "shard by shard and cut at every place into two and into three shards (embedding, blocks and head are layers",
        "alike; with three shards the prompt comes in two chunks).",
        f"Greedy tokens ({ANSWER} after a prompt of {PROMPT}) must equal those of `generate` in float32, logits must",
        f"agree within {TOLERANCE:g}. Controls: skipping any one block, permuting positions and dropping the final",
        f"norm each changed the tokens, and the answer holds at least {DISTINCT} different ones; seed and initial",
        "scale were changed until that was so.",
        "",
        "Three sequences in one batch, each at another position and in another order at every step, gave the tokens",
        "and logits that each gives alone. Torch also computed what the graph engine does, through one cut, but for",
        "quantized files, which stand for the float32 weights that transformers was given (docs/formats.md).",
        "",
        "| family | model type | computed by | blocks | cuts | tokens equal | largest logit difference "
        "| of three together | by torch | controls passed | notes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        notes = "; ".join(filter(None, [o.family.note, o.error]))
        torch_too = f"{o.torch_difference:.1e}" if o.by == "graph" and not o.family.quantised else ""
        lines.append(
            f"| {o.family.name} | `{o.family.model_type}` | {o.by} | {o.blocks} | {o.cuts} | {o.equal} of {o.cuts} "
            f"| {o.difference:.1e} | {o.together_difference:.1e} | {torch_too} | {o.controls} | {notes} |"
        )
    return "\n".join(lines) + "\n"


def walked(inspected: Inspected, cut: Cut, ids: Floats) -> Floats:
    """Logits [n, vocabulary] of token ids [n] that a cut's shards, all of them graphs, take in one at a time."""
    shards = load(inspected, cut)
    assert all(isinstance(shard, GraphShard) for shard in shards)
    rows = []
    for position, token in enumerate(ids):
        carried: npt.NDArray[Any] = np.array([token])
        for shard in shards:
            carried = shard.forward(carried, [in_slot(0, position, 1, True)])
        rows.append(carried[0].copy())
    return np.array(rows)


def likeness(some: Floats, others: Floats) -> float:
    """The median over positions of the cosine of their logits: rounding sends some tokens to another expert."""
    lengths = np.linalg.norm(some, axis=1) * np.linalg.norm(others, axis=1)
    return float(np.median((some * others).sum(1) / lengths))


def main() -> int:
    """Examine every family (or those named) and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("names", nargs="*", help="model types; all if none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    outcomes = []
    for number, family in enumerate(FAMILIES):
        if options.names and family.model_type not in options.names:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            try:
                outcome = examine(example(family, Path(directory)), torch_too=share(number)[1])
            except Exception as error:  # one family's trouble is a line of the table
                if options.names:
                    raise
                outcome = Outcome(family, error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        outcomes.append(outcome)
        print(
            f"{family.model_type:20} {outcome.by[:5]:5} {'ok' if outcome.passed else 'FAILED'} "
            f"cuts {outcome.equal}/{outcome.cuts} difference {outcome.difference:.1e} "
            f"together {outcome.together_difference:.1e} torch {outcome.torch_difference:.1e} "
            f"scale {outcome.scale} distinct {outcome.distinct} {time.perf_counter() - start:.1f} s {outcome.error}",
            flush=True,
        )
    if options.write:
        options.write.write_text(table(outcomes), encoding="utf-8")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def quiet() -> None:
    """No progress bars, no advice."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
