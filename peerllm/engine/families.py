"""The model types whose shards the architecture test found equal to the whole model, token for token."""

from __future__ import annotations

from peerllm.engine.graph import family

FAMILIES: frozenset[str] = frozenset(
    [
        *family.FAMILIES,
        "afmoe", "apertus", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere2_moe", "dbrx", "deepseek_v2",
        "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5_moe", "exaone_moe", "falcon_h1", "gemma3n_text",
        "gemma4_text", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt_neox_japanese", "granitemoehybrid",
        "hunyuan_v1_moe", "hy_v3", "jetmoe", "laguna", "lfm2", "lfm2_moe", "llama4_text", "mellum", "mimo_v2_flash",
        "minicpm3", "minimax_m2", "ministral3", "modernbert-decoder", "mpt", "nanochat", "nemotron_h", "olmo_hybrid",
        "phimoe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "solar_open", "xglm", "youtu",
    ]
)  # fmt: skip
