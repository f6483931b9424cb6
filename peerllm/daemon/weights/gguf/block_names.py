"""What llama.cpp calls tensors, in a block (without blk.N.) or beside the blocks, and what transformers calls them."""

from __future__ import annotations

from collections.abc import Mapping

Names = Mapping[str, str]

LLAMA: Names = {
    "token_embd": "embed_tokens", "output_norm": "norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
NORMED = {**LLAMA, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
EXPERTS: Names = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
POSTED = {
    **NORMED, "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
GEMMA2 = {**POSTED, "ffn_norm": "pre_feedforward_layernorm"}
GEMMA4 = {
    **GEMMA2, "per_layer_token_embd": "embed_tokens_per_layer", "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm", "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm", "layer_output_scale": "layer_scalar",
}  # fmt: skip
FC = {**LLAMA, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
PHI = {
    **LLAMA, "output_norm": "final_layernorm", "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}  # fmt: skip
GATE_UP = {**LLAMA, "ffn_up": "mlp.gate_up_proj"}
GLM4 = {**GATE_UP, "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"}
GPT2: Names = {
    "token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "attn_norm": "ln_1", "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
NEOX: Names = {
    "token_embd": "embed_in", "output_norm": "final_layer_norm", "output": "embed_out",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
FALCON: Names = {
    **NEOX, "token_embd": "word_embeddings", "output_norm": "ln_f", "output": "lm_head",
    "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
}  # fmt: skip
GPT_OSS = {
    **LLAMA, **EXPERTS, "ffn_gate_inp": "mlp.router", "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
}  # fmt: skip
MIXTRAL = {**LLAMA, **EXPERTS, "ffn_gate_inp": "block_sparse_moe.gate"}
GRANITE_MOE = {**LLAMA, **EXPERTS, "ffn_gate_inp": "block_sparse_moe.router.layer"}

LFM2 = {
    **NORMED, "token_embd_norm": "embedding_norm", "attn_norm": "operator_norm", "ffn_norm": "ffn_norm",
    "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm",
    "attn_output": "self_attn.out_proj", "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
    "shortconv.conv.weight": "conv.conv.weight", "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}  # fmt: skip
LFM2_MOE = {
    **EXPERTS, **LFM2, "ffn_gate_inp": "feed_forward.gate", "exp_probs_b.bias": "feed_forward.expert_bias",
}  # fmt: skip
QWEN35 = {
    **NORMED, "post_attention_norm": "post_attention_layernorm", "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z", "ssm_alpha": "linear_attn.in_proj_a", "ssm_beta": "linear_attn.in_proj_b",
    "ssm_out": "linear_attn.out_proj", "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight", "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
}  # fmt: skip

GRANITE_HYBRID = {
    **GRANITE_MOE, "ssm_in": "mamba.in_proj", "ssm_out": "mamba.out_proj", "ssm_conv1d.weight": "mamba.conv1d.weight",
    "ssm_conv1d.bias": "mamba.conv1d.bias", "ssm_a": "mamba.A_log", "ssm_d": "mamba.D", "ssm_dt.bias": "mamba.dt_bias",
    "ssm_norm.weight": "mamba.norm.weight",
}  # fmt: skip

DEEPSEEK2 = {
    **LLAMA, **EXPERTS, "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj", "attn_v_b": "self_attn.v_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj", "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}  # fmt: skip
