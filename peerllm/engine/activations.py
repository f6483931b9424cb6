"""Hidden states for a slow link: a token's numbers as int8, in steps of 1/127 of the largest among them.

One scale per token and nothing else: a row is right by itself, whatever it is packed with, and what comes back is at
most half a step off, before it is brought to the compute dtype (which is one that holds the number sent: at most a
step). Few operations, because a step of one token pays for each of them.
"""

from __future__ import annotations

import torch

STEPS = 127  # of a token's largest number, on either side of 0
LEAST = torch.finfo(torch.float32).tiny  # of a scale: rows of zeros have one, and it has a reciprocal


def rounded(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Floats [n, hidden] to int8 [n, hidden] and each row's scale, float32 [n].

    The scale of a row that holds a number that is not finite is not finite either.
    """
    scales = hidden.abs().amax(1, keepdim=True).float().div_(STEPS).clamp_min_(LEAST)
    return torch.div(hidden, scales).round_().to(torch.int8), scales.squeeze(1)


def restored(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `rounded` was given, as far as that can be told."""
    return values.to(torch.float32).mul_(scales.unsqueeze(1)).to(dtype)
