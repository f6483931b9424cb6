"""The model types that the architecture test has divided and found equal to the whole model, token for token."""

from __future__ import annotations

FAMILIES: frozenset[str] = frozenset(
    [
        "afmoe", "apertus", "arcee", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2",
        "cohere2_moe", "cwm", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1", "ernie4_5",
        "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "flex_olmo", "gemma", "gemma2",
        "gemma3_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo",
        "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe",
        "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3",
        "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "laguna", "lfm2", "lfm2_moe", "llama",
        "llama4_text", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral",
        "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
        "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open",
        "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu",
    ]
)  # fmt: skip
