"""What decides the built-in model: sizes, seed, rates; and the untrained model and optimizers from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peerllm.builtin.vocabulary import VOCABULARY

CONTEXT_TOKENS = 2048  # what the configuration allows; the longest training row is LONG_ROW_TOKENS
ROW_TOKENS, LONG_ROW_TOKENS = 512, 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result besides the code and the library versions."""

    seed: int = 2026
    steps: int = 1550
    step_tokens: int = 4096
    matrix_rate: float = 0.04  # Muon, for the matrices of the layers
    other_rate: float = 0.006  # AdamW, for the embedding and the norms
    weight_decay: float = 0.01
    warm_up_steps: int = 40
    decay_share: float = 0.61  # of the steps, at the end, in which the rates fall to nothing
    long_row_share: float = 0.12  # of the steps, at the end, with rows of LONG_ROW_TOKENS
    later_from_step: int = 600  # the step from which on the dialogues come in the later mix
    layers: int = 12
    hidden: int = 128
    intermediate: int = 384
    heads: int = 4
    key_value_heads: int = 2
    head_size: int = 32

    def row_tokens(self, step: int) -> int:
        """Length of the rows of a step."""
        return LONG_ROW_TOKENS if step >= self.steps * (1 - self.long_row_share) else ROW_TOKENS

    def rate_share(self, step: int) -> float:
        """The share of the full learning rate: a warm-up, a plateau, a straight fall to nothing."""
        warm = (step + 1) / self.warm_up_steps
        left = (self.steps - step) / (self.steps * self.decay_share)
        return min(warm, left, 1.0)


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained model; the matrices that write into the residual stream begin at zero."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.head_size,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.04,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    return model


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; `full_rate` keeps each group's rate."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    decay = recipe.weight_decay
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=decay)
    adam = torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=decay)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return [muon, adam]
