"""Tiny models of transformers as GGUF files, named, ordered and described as llama.cpp's converter does it.

Names come from the gguf library's maps, so that the project's own table is not what it is measured by.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
ARCH = gguf.MODEL_ARCH
ARCHES = {
    "llama": ARCH.LLAMA, "mixtral": ARCH.LLAMA, "qwen2": ARCH.QWEN2, "qwen2_moe": ARCH.QWEN2MOE, "qwen3": ARCH.QWEN3,
    "qwen3_moe": ARCH.QWEN3MOE, "gemma": ARCH.GEMMA, "gemma2": ARCH.GEMMA2, "gemma3_text": ARCH.GEMMA3,
    "gemma4_text": ARCH.GEMMA4,
    "phi": ARCH.PHI2, "phi3": ARCH.PHI3, "granite": ARCH.GRANITE, "granitemoe": ARCH.GRANITE_MOE,
    "granitemoeshared": ARCH.GRANITE_MOE, "olmo": ARCH.OLMO, "olmo2": ARCH.OLMO2, "olmo3": ARCH.OLMO2,
    "olmoe": ARCH.OLMOE, "starcoder2": ARCH.STARCODER2, "gpt_oss": ARCH.GPT_OSS, "stablelm": ARCH.STABLELM,
    "cohere": ARCH.COMMAND_R, "cohere2": ARCH.COHERE2, "glm": ARCH.CHATGLM, "glm4": ARCH.GLM4, "falcon": ARCH.FALCON,
    "gpt2": ARCH.GPT2, "gpt_bigcode": ARCH.STARCODER, "gpt_neox": ARCH.GPTNEOX, "nemotron": ARCH.NEMOTRON,
    "exaone4": ARCH.EXAONE4, "smollm3": ARCH.SMOLLM3, "arcee": ARCH.ARCEE, "ernie4_5": ARCH.ERNIE4_5,
    "seed_oss": ARCH.SEED_OSS, "hunyuan_v1_dense": ARCH.HUNYUAN_DENSE, "lfm2": ARCH.LFM2, "lfm2_moe": ARCH.LFM2MOE,
    "qwen3_5_text": ARCH.QWEN35, "qwen3_5_moe_text": ARCH.QWEN35MOE, "granitemoehybrid": ARCH.GRANITE_HYBRID,
    "deepseek_v2": ARCH.DEEPSEEK2, "deepseek_v3": ARCH.DEEPSEEK2, "youtu": ARCH.DEEPSEEK2,
}  # fmt: skip
PAIRED = {
    "llama", "mixtral", "granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "olmo", "smollm3", "arcee",
}  # fmt: skip
NORMS_PLUS_ONE = {"gemma", "gemma2", "gemma3_text", "nemotron", "qwen3_5_text", "qwen3_5_moe_text"}
TURNED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def write_gguf(model: Any, path: Path, quantised: bool = False, name: str = "") -> None:
    """Write a model; `quantised`: matrices as Q8_0 where their rows allow it; `name`: of another architecture."""
    config = model.config.to_dict()
    arch = ARCHES[config["model_type"]]
    writer = gguf.GGUFWriter(path, name or gguf.MODEL_ARCH_NAMES[arch])
    describe_model(writer, config)
    for key, value in vocabulary(config["vocab_size"]).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(arch, blocks_of(config))
    for theirs, array in reordered(config, tensors_of(model, path.parent)):
        found = theirs if theirs.startswith(("rope_f", "blk.")) else names.get_name(theirs, (".weight", ".bias"))
        assert found is not None, theirs
        matrix = array.ndim > 1 and array.shape[-1] % 32 == 0 and "inp" not in found and "position" not in found
        if quantised and matrix:
            raw = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(found, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(found, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(count: int) -> dict[str, Any]:
    """Metadata of a tokenizer with so many tokens."""
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", *(f"<{number}>" for number in range(3, count))],
        "tokenizer.ggml.token_type": [1] * count, "tokenizer.ggml.merges": ["a b"],
    }  # fmt: skip


def tensors_of(model: Any, directory: Path) -> Tensors:
    """The tensors as transformers saves them."""
    from safetensors.numpy import load_file

    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(directory / "saved")
    return {name: array for name, array in load_file(directory / "saved" / "model.safetensors").items()}


def blocks_of(config: Mapping[str, Any]) -> int:
    return int(config.get("num_hidden_layers") or config["n_layer"])


# ---- metadata -------------------------------------------------------------------------------------------------------


def describe_model(writer: Any, config: Mapping[str, Any]) -> None:
    """The hyperparameters, by the keys that the converter reads them from."""

    def first(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    hidden, heads = first("hidden_size", "n_embd"), first("num_attention_heads", "n_head")
    width = config.get("head_dim") or hidden // heads
    own = config["model_type"] in ("gpt2", "gpt_bigcode", "falcon")
    wide = first("n_inner", "ffn_hidden_size") if own else config["intermediate_size"]
    known: list[tuple[Callable[[Any], None], Any]] = [
        (writer.add_block_count, blocks_of(config)),
        (writer.add_context_length, first("max_position_embeddings", "n_positions")),
        (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, wide or 4 * hidden),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, first("num_kv_heads", "num_key_value_heads")),  # a later value takes its place
        (writer.add_layer_norm_rms_eps, config.get("rms_norm_eps")),
        (writer.add_layer_norm_eps, first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")),
        (writer.add_expert_count, first("num_local_experts", "num_experts")),
        (writer.add_expert_used_count, config.get("num_experts_per_tok")),
    ]
    for add, value in known:
        if value is not None:
            add(value)
    if "head_dim" in config and not config["model_type"].startswith(("granite", "falcon", "glm", "gemma4")):
        writer.add_key_length(width)
        writer.add_value_length(width)
    rope(writer, config, width)
    if (more := MORE.get(config["model_type"])) is not None:
        more(writer, config)


def rope(writer: Any, config: Mapping[str, Any], width: int) -> None:
    about = config.get("rope_parameters") or {}
    full = about.get("full_attention", about)
    if full.get("rope_theta") is not None:
        writer.add_rope_freq_base(full["rope_theta"])
    if (local := about.get("sliding_attention", {}).get("rope_theta")) is not None:
        writer.add_rope_freq_base_swa(local)
    part = full.get("partial_rotary_factor", 1.0)
    if config["model_type"] not in ("gpt2", "gpt_bigcode", "gemma2", "gemma4_text", "qwen2"):
        writer.add_rope_dimension_count(int(width * part))
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    elif full.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        for key, add in (("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"), ("attention_factor", "attn_factors")):
            if full.get(key) is not None:
                name = f"add_rope_scaling_yarn_{add}" if key.startswith("beta") else f"add_rope_scaling_{add}"
                getattr(writer, name)(full[key])
    elif full.get("rope_type") == "longrope":
        scale = config["max_position_embeddings"] / full["original_max_position_embeddings"]
        length = full["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(length)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(length)) if scale > 1 else 1.0)


def windows(writer: Any, config: Mapping[str, Any]) -> None:
    if config.get("sliding_window") is not None:
        writer.add_sliding_window(config["sliding_window"])


def pattern(writer: Any, config: Mapping[str, Any]) -> None:
    windows(writer, config)
    if config.get("sliding_window") is not None:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def gemma2(writer: Any, config: Mapping[str, Any]) -> None:
    windows(writer, config)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key) is not None:
            add(config[key])


def gemma4(writer: Any, config: Mapping[str, Any]) -> None:
    gemma2(writer, config)
    full = [kind == "full_attention" for kind in config["layer_types"]]
    own = {int(key): value for key, value in config["per_layer_config"].items()}[full.index(True)]
    width, groups = own["head_dim"], own.get("num_key_value_heads", config["num_key_value_heads"])
    shared = config["num_kv_shared_layers"]
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_sliding_window_pattern([not one for one in full])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(width)
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(config["head_dim"])
    if config["use_double_wide_mlp"]:
        wide = config["intermediate_size"]
        writer.add_feed_forward_length([wide] * (len(full) - shared) + [2 * wide] * shared)
    if groups != config["num_key_value_heads"]:
        writer.add_head_count_kv([groups if one else config["num_key_value_heads"] for one in full])


def granite(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def qwen_moe(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def gpt_oss(writer: Any, config: Mapping[str, Any]) -> None:
    windows(writer, config)
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def cohere(writer: Any, config: Mapping[str, Any]) -> None:
    windows(writer, config)
    writer.add_logit_scale(config["logit_scale"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def olmo(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_eps(1e-5)
    if config["clip_qkv"] is not None:
        writer.add_clamp_kqv(config["clip_qkv"])


def parallel(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_parallel_residual(config["use_parallel_residual"])


def phi3(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_sliding_window(config.get("sliding_window") or 0)


def lfm2(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    groups = config["num_key_value_heads"]
    writer.add_head_count_kv([groups if kind == "full_attention" else 0 for kind in config["layer_types"]])
    if config.get("block_auto_adjust_ff_dim"):
        width, multiple = int(2 * config["intermediate_size"] / 3), config["block_multiple_of"]
        writer.add_feed_forward_length(-(-int(config["block_ffn_dim_multiplier"] * width) // multiple) * multiple)
    if "moe_intermediate_size" in config:
        qwen_moe(writer, config)
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def granite_hybrid(writer: Any, config: Mapping[str, Any]) -> None:
    granite(writer, config)
    writer.add_ssm_conv_kernel(config["mamba_d_conv"])
    writer.add_ssm_state_size(config["mamba_d_state"])
    writer.add_ssm_group_count(config["mamba_n_groups"])
    writer.add_ssm_inner_size(config["mamba_n_heads"] * config["mamba_d_head"])
    writer.add_ssm_time_step_rank(config["mamba_n_heads"])
    groups = config["num_key_value_heads"]
    writer.add_head_count_kv([groups if kind == "full_attention" else 0 for kind in config["layer_types"]])
    writer.add_rope_scaling_finetuned(config["position_embedding_type"] == "rope")


def deepseek2(writer: Any, config: Mapping[str, Any]) -> None:
    rank, turned, plain = (config[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"))
    writer.add_head_count_kv(1)
    writer.add_kv_lora_rank(rank)
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_key_length(rank + turned)
    writer.add_value_length(rank)
    writer.add_key_length_mla(plain + turned)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(turned)
    if (weight := config["rope_parameters"].get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * weight)
    if "n_routed_experts" not in config:
        return
    kinds = gguf.ExpertGatingFuncType
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_gating_func(kinds.SIGMOID if config["model_type"] == "deepseek_v3" else kinds.SOFTMAX)
    if config["model_type"] == "deepseek_v3":
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if config["n_group"]:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def qwen35(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * config["linear_value_head_dim"])
    writer.add_full_attention_interval(2)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    if "moe_intermediate_size" in config:
        qwen_moe(writer, config)


MORE: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "qwen2_moe": qwen_moe, "qwen3_moe": qwen_moe, "gemma2": gemma2, "gemma3_text": gemma2, "gemma4_text": gemma4,
    "granite": granite,
    "granitemoe": granite, "granitemoeshared": granite, "gpt_oss": gpt_oss, "cohere": cohere, "cohere2": cohere,
    "olmo": olmo, "olmo3": pattern, "exaone4": pattern, "stablelm": parallel, "gpt_neox": parallel, "phi3": phi3,
    "gpt_bigcode": lambda writer, config: writer.add_head_count_kv(1), "lfm2": lfm2, "lfm2_moe": lfm2,
    "qwen3_5_text": qwen35, "qwen3_5_moe_text": qwen35, "granitemoehybrid": granite_hybrid,
    "deepseek_v2": deepseek2, "deepseek_v3": deepseek2, "youtu": deepseek2,
}  # fmt: skip


# ---- tensors --------------------------------------------------------------------------------------------------------


def reordered(config: Mapping[str, Any], tensors: Tensors) -> Iterator[tuple[str, Array]]:
    """The tensors in the converter's order of rows and with the names that it maps."""
    kind = config["model_type"]
    stacks: dict[str, dict[int, Array]] = {}
    for name, array in tensors.items():
        if kind in NORMS_PLUS_ONE and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            array = array + 1
        if "linear_attn." in name:
            name, array = name.replace(".dt_bias", ".dt_proj.bias"), tiled(config, name, array)
        if "mamba." in name:
            name, array = name.replace(".dt_bias", ".dt_proj.bias"), mamba(config, name, array)
        if name.endswith(("conv.conv.weight", "conv1d.weight")):
            array = array.squeeze(1)
        if kind in PAIRED and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
            count = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            array = permuted(array, count)
        if kind == "gpt2" and TURNED.search(name):
            array = array.T
        if kind == "gpt_neox" and "query_key_value" in name:
            array = grouped(array, config["num_attention_heads"], 1)
        if kind == "falcon" and "query_key_value" in name:
            groups = config["num_kv_heads"]
            array = grouped(array, groups, config["num_attention_heads"] // groups)
        array = np.ascontiguousarray(array)
        if name.endswith("kv_b_proj.weight"):
            plain, rank = config["qk_nope_head_dim"], config["kv_lora_rank"]
            both = array.reshape(config["num_attention_heads"], -1, rank)
            yield name.replace("kv_b", "k_b"), np.ascontiguousarray(both[:, :plain].swapaxes(1, 2))
            yield name.replace("kv_b", "v_b"), np.ascontiguousarray(both[:, plain:])
            continue
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if kind == "cohere2" and name.endswith(".bias"):
            assert not array.any()
        elif found := re.fullmatch(r"(.*experts|.*layernorm\.norms)\.(\d+)(\..*)", name):
            stacks.setdefault(found[1] + found[3], {})[int(found[2])] = array
        elif ("experts" in name and "shared_experts" not in name) or "input_linear" in name or "shared_mlp" in name:
            yield from parted(name, array, bool(config.get("num_local_experts", 1)))
        elif name.endswith(("sinks", "layer_scalar")):
            yield f"{name}.weight", array
        elif name.endswith("expert_bias"):
            yield f"{name}.bias", array
        else:
            yield name, array
    for name, parts in stacks.items():
        stack = np.stack([parts[number] for number in range(len(parts))])
        yield (
            name.replace("block_sparse_moe.experts", "feed_forward.experts")
            .removeprefix("model." if "block_sparse" in name or "feed_forward" in name else "")
            .replace(".norms", ""),
            stack,
        )
    yield from rotations(config)


def tiled(config: Mapping[str, Any], name: str, array: Array) -> Array:
    """Value heads, of which first comes the first one of each key head; and decays as they are used."""
    keys, heads, width = (config[f"linear_{key}"] for key in ("num_key_heads", "num_value_heads", "value_head_dim"))
    apart = 2 * keys * config["linear_key_head_dim"]  # rows of queries and keys

    def turned(some: Array, each: int) -> Array:
        return some.reshape(keys, heads // keys, each, *some.shape[1:]).swapaxes(0, 1).reshape(some.shape)

    match name.rpartition("linear_attn.")[2].split(".")[0]:
        case "in_proj_qkv" | "conv1d":
            return np.concatenate([array[:apart], turned(array[apart:], width)])
        case "in_proj_z":
            return turned(array, width)
        case "out_proj":
            return turned(array.T, width).T
        case "A_log":
            return -np.exp(turned(array, 1))
        case "in_proj_a" | "in_proj_b" | "dt_bias":
            return turned(array, 1)
    return array


def mamba(config: Mapping[str, Any], name: str, array: Array) -> Array:
    """Vectors as columns, norms by group; and decays as they are used."""
    if name.endswith(("A_log", "mamba.D")):
        return (-np.exp(array) if name.endswith("A_log") else array)[:, None]
    return array.reshape(config["mamba_n_groups"], -1) if name.endswith("norm.weight") else array


def permuted(array: Array, heads: int) -> Array:
    """Rows of both halves of a head taken in turns."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def grouped(array: Array, groups: int, each: int) -> Array:
    """Queries, keys and values of each group as queries, keys and values of all."""
    width = array.shape[0] // (groups * (each + 2))
    apart = array.reshape(groups, each + 2, width, *array.shape[1:])
    parts = apart[:, :each], apart[:, each], apart[:, each + 1]
    return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])


def parted(name: str, array: Array, experts: bool) -> Iterator[tuple[str, Array]]:
    """Stacks of experts, and feed-forwards that hold gate and up in one matrix."""
    block = name.split(".")[2]
    if "input_linear" in name:
        end = ("_shexp" if experts else "") if "shared_mlp" in name else "_exps"
        for role, some in zip(("gate", "up"), np.split(array, 2, axis=-2), strict=True):
            yield f"blk.{block}.ffn_{role}{end}.weight", np.ascontiguousarray(some)
    elif name.endswith("shared_mlp.output_linear.weight"):
        yield f"blk.{block}.ffn_down{'_shexp' if experts else ''}.weight", array
    elif name.endswith("output_linear.weight"):
        yield f"blk.{block}.ffn_down_exps.weight", array
    else:  # gpt-oss: gate and up alternate, matrices lie on their sides
        role, _, bias = name.rpartition(".")[2].partition("_proj")
        array = array if bias else array.swapaxes(-1, -2)
        found = {"down": array} if role == "down" else {"gate": array[:, ::2], "up": array[:, 1::2]}
        for one, some in found.items():
            end = "bias" if bias else "weight"
            yield f"blk.{block}.ffn_{one}_exps.{end}", np.ascontiguousarray(some)


def rotations(config: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """The divisors of frequencies that llama.cpp wants as tensors."""
    about = config.get("rope_parameters") or {}
    if (full := about.get("full_attention", {})).get("rope_type") == "proportional":
        own = {int(key): value for key, value in config["per_layer_config"].items()}
        pairs = own[config["layer_types"].index("full_attention")]["head_dim"] // 2
        turned = int(2 * pairs * full["partial_rotary_factor"] / 2)
        yield "rope_freqs.weight", np.array([1.0] * turned + [1e30] * (pairs - turned), np.float32)
    if about.get("rope_type") == "longrope":
        yield "rope_factors_short.weight", np.array(about["short_factor"], np.float32)
        yield "rope_factors_long.weight", np.array(about["long_factor"], np.float32)
    elif about.get("rope_type") == "llama3":
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        waves = 2 * math.pi * about["rope_theta"] ** (np.arange(0, width, 2) / width)
        low, high, factor = about["low_freq_factor"], about["high_freq_factor"], about["factor"]
        smooth = (about["original_max_position_embeddings"] / waves - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        yield "rope_freqs.weight", np.where(smooth > 1, 1.0, np.where(smooth < 0, factor, between)).astype(np.float32)
