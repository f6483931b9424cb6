"""llama.cpp's programs, and GGUF files for them with the numbers of a checkpoint of Llama's architecture.

Tokens of those files have made-up names: llama.cpp loads no model without any, and its benchmarks send random ids.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from peerllm.engine.weights.checkpoint import mapped, read_tensors

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def permuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face's files pair a row with one half a head away."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model: Path, out: Path) -> None:
    """A Llama checkpoint in bfloat16 with tied embeddings, in bfloat16; norms in float32."""
    config = json.loads((model / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(32)  # mostly bfloat16
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = ["<", "0", "<0", *(f"<{number}>" for number in range(3, config["vocab_size"]))]
    writer.add_token_list(words)
    writer.add_token_types([TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["< 0"])
    tensors = read_tensors(model)

    def add(name: str, source: str, permute: int = 0) -> None:
        rows = mapped(tensors[f"model.{source}"])
        if rows.ndim == 1:
            writer.add_tensor(name, rows.astype(np.float32))
            return
        rows = np.ascontiguousarray(permuted(rows, permute) if permute else rows)
        writer.add_tensor(name, rows.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)

    add("token_embd.weight", "embed_tokens.weight")
    add("output_norm.weight", "norm.weight")
    for number in range(config["num_hidden_layers"]):
        for source, name in NAMES.items():
            turn = {"attn_q": heads, "attn_k": groups}.get(name, 0)
            add(f"blk.{number}.{name}.weight", f"layers.{number}.{source}.weight", turn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_both(model: Path, root: Path, programs: Path) -> dict[str, Path]:
    """By kind of ours what stands beside it: bfloat16, and Q4_0 of all matrices, the head's too."""
    whole, rounded = root / "bf16.gguf", root / "q4_0.gguf"
    write_gguf(model, whole)
    subprocess.run([programs / "llama-quantize", "--pure", whole, rounded, "Q4_0"], capture_output=True, check=True)
    return {"int8": whole, "int4": rounded}


def told(program: Path, *options: str, prefix: Sequence[str] = ()) -> list[dict[str, float]]:
    """What a benchmark of llama.cpp prints, line by line."""
    done = subprocess.run([*prefix, program, *options], capture_output=True, check=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
