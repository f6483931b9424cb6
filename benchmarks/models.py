"""Random-weight models of real shapes, written tensor by tensor, so that speed can be measured without a download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from peerllm.builtin import MODEL_DIR

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": None,
}  # 1.24 B parameters


def write_llama(directory: Path, config: dict[str, object], seed: int = 0) -> Path:
    """A Hugging Face model directory with normally distributed bfloat16 weights and the built-in model's tokenizer."""
    if (directory / "model.safetensors.index.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    for file in MODEL_DIR.iterdir():  # tokenizer and chat template; its ids are a subset of the vocabulary
        if file.name.startswith(("tokenizer", "special", "chat_template")):
            shutil.copy(file, directory / file.name)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    hidden, wide = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    keys = int(str(config["num_key_value_heads"])) * int(str(config["head_dim"]))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    weight_map, total = {}, 0

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())

    save(
        "embedding.safetensors",
        {
            "model.embed_tokens.weight": normal(int(str(config["vocab_size"])), hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        },
    )
    for index in range(int(str(config["num_hidden_layers"]))):
        name = f"model.layers.{index}."
        save(
            f"block-{index:02}.safetensors",
            {
                name + "self_attn.q_proj.weight": normal(hidden, hidden),
                name + "self_attn.k_proj.weight": normal(keys, hidden),
                name + "self_attn.v_proj.weight": normal(keys, hidden),
                name + "self_attn.o_proj.weight": normal(hidden, hidden),
                name + "mlp.gate_proj.weight": normal(wide, hidden),
                name + "mlp.up_proj.weight": normal(wide, hidden),
                name + "mlp.down_proj.weight": normal(hidden, wide),
                name + "input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
                name + "post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            },
        )
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return directory
