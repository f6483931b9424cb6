"""Tiny random models of real families with the built-in model's tokenizer, sized so that three devices are needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peerllm.builtin import MODEL_DIR

BLOCKS = 6
CONTEXT = 512
_COMMON: dict[str, Any] = {"vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma": {**_LLAMA_LIKE, "head_dim": 16},
    "gpt2": {**_COMMON, "n_embd": 64, "n_layer": BLOCKS, "n_head": 4, "n_positions": CONTEXT},
    "opt": {
        **_COMMON,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "word_embed_proj_dim": 64,
    },
}
KEEPING: dict[str, dict[str, Any]] = {  # families whose layers keep something else than all keys and values
    "mistral": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 24},
    "qwen3_5_text": {
        **_LLAMA_LIKE,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * (BLOCKS // 2),
    },
}
SCALE = 6.0  # at the usual scale a random model repeats one token whatever its layers do


def make(family: str, directory: Path, seed: int = 1) -> Path:
    """A model directory in Hugging Face layout, float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(FAMILIES | KEEPING)[family])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                weight.mul_(SCALE)
    model.generation_config.eos_token_id = None  # the answer's length is the test's to choose
    model.config.eos_token_id = None
    model.save_pretrained(directory)
    for file in MODEL_DIR.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, directory / file.name)
    return directory


def answer(directory: Path, question: str, tokens: int) -> list[int]:
    """What transformers says, greedily, on one device."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        made = model.generate(prompt, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    return [int(token) for token in made[0, prompt.shape[1] :]]
