"""What families call their tensors in files, by role."""

from __future__ import annotations

from collections.abc import Mapping

Names = Mapping[str, str]
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
