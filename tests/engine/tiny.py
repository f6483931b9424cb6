"""Tiny random models made on the spot, and what transformers says that they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


def make_llama(directory: Path, layers: int = 4, hidden: int = 32, seed: int = 0, **options: object) -> Path:
    """A random Llama whose answers vary: the scale is raised until layers matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    LlamaForCausalLM(config).eval().save_pretrained(directory)
    return directory


def reference(directory: Path, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens of the whole model in float32."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        given = torch.tensor([list(prompt)])
        ids = model.generate(
            given,
            attention_mask=torch.ones_like(given),  # else ids equal to the padding's would be left out
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return ids[0, len(prompt) :].tolist()


def prompt(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
