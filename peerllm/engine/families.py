"""The model types whose shards the architecture test found equal to the whole model, token for token."""

from __future__ import annotations

from peerllm.engine.graph import table

FAMILIES: frozenset[str] = frozenset(
    [
        *table.FAMILIES,
        "afmoe", "apertus", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere2_moe", "dbrx", "diffllama",
        "doge", "dots1", "ernie4_5_moe", "exaone_moe", "falcon_h1", "gemma3n_text", "glm4_moe",
        "gpt-sw3", "gpt_neox_japanese", "hunyuan_v1_moe", "hy_v3", "jetmoe", "laguna", "llama4_text", "mellum",
        "mimo_v2_flash", "minimax_m2", "ministral3", "modernbert-decoder", "mpt", "nanochat", "nemotron_h",
        "olmo_hybrid", "phimoe", "solar_open", "xglm",
    ]
)  # fmt: skip
