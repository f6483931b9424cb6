"""The recipe of the built-in model (sizes, seed, rates), and the untrained model and optimizers that follow from it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peerllm.builtin.vocabulary import VOCABULARY

CONTEXT_TOKENS = 2048  # what the configuration allows; the longest training row is LONG_ROW_TOKENS
ROW_TOKENS, LONG_ROW_TOKENS = 512, 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result besides the code and the library versions."""

    seed: int = 2026
    steps: int = 1830
    step_tokens: int = 4096
    matrix_rate: float = 0.04  # Muon, for the matrices of the layers
    other_rate: float = 0.006  # AdamW, for the embedding and the norms
    weight_decay: float = 0.01
    # (step, share of the full rates), interpolated linearly; the second last rise is for the last mix.
    rates: tuple[tuple[int, float], ...] = (
        (-1, 0.0), (39, 1.0), (604, 1.0), (1000, 0.582), (1200, 0.259), (1210, 0.35), (1260, 0.35), (1400, 0.0),
        (1420, 0.35), (1470, 0.35), (1650, 0.0),
        (1660, 0.3), (1690, 0.3), (1830, 0.0),
    )  # fmt: skip
    long_rows: tuple[tuple[int, int], ...] = (
        (1350, 1400),
        (1600, 1650),
        (1800, 1830),
    )  # steps with rows of LONG_ROW_TOKENS
    mixes_from_steps: tuple[int, ...] = (0, 600, 1200, 1400, 1650)  # where each of dialogues.MIXES begins
    layers: int = 12
    hidden: int = 128
    intermediate: int = 384
    heads: int = 4
    key_value_heads: int = 2
    head_size: int = 32

    def scaled(self, steps: int, seed: int) -> Recipe:
        """The same recipe with another number of steps and another seed; every step number in it is scaled."""
        part = steps / self.steps
        return replace(
            self,
            seed=seed,
            steps=steps,
            rates=((-1, 0.0), *((max(round(step * part), i), share) for i, (step, share) in enumerate(self.rates[1:]))),
            long_rows=tuple((round(a * part), round(b * part)) for a, b in self.long_rows),
            mixes_from_steps=tuple(round(step * part) for step in self.mixes_from_steps),
        )

    def mix(self, step: int) -> int:
        """The number of the mix of dialogues at a step."""
        return bisect_right(self.mixes_from_steps, step) - 1

    def row_tokens(self, step: int) -> int:
        """Length of the rows of a step."""
        return LONG_ROW_TOKENS if any(a <= step < b for a, b in self.long_rows) else ROW_TOKENS

    def rate_share(self, step: int) -> float:
        """The share of the full learning rate at a step; 0 after the last point of `rates`."""
        for (before, low), (after, high) in pairwise(self.rates):
            if before <= step <= after:
                return low + (high - low) * (step - before) / (after - before)
        return 0.0


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
