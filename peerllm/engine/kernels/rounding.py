"""Weights to whole numbers: symmetric, a scale for each block of neighbours in a row (as GGML's Q4_0 and Q8_0 do)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROWS_BYTES = 1 << 18  # of float32 rows that are rounded at once


def rounded(runs: Sequence[torch.Tensor], bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of runs of rows [some, columns], joined: codes, and float32 scales [rows, columns / block].

    Codes are uint8: [rows, columns], or of 4 bits [rows, columns / 2], two in a byte, the first in the lower half.
    weight ≈ (code - zero) · scale, with a zero of 2^(bits-1). The scale maps the weight of the largest magnitude, with
    its sign, to the least code: the range is used to its end, which has one code more.
    """
    count, columns = sum(map(len, runs)), runs[0].shape[1]
    codes = torch.empty(count, columns * bits // 8, dtype=torch.uint8)
    scales = torch.empty(count, columns // block)
    zero = 1 << (bits - 1)
    step = max(1, ROWS_BYTES // (4 * columns))
    start = 0
    for rows in (part for run in runs for part in torch.split(run, step)):
        some = rows.float().reshape(-1, columns // block, block)
        largest = some.gather(2, some.abs().argmax(2, keepdim=True))
        scale = largest / -zero
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        code = (some * inverse).round_().add_(zero).clamp_(0, 2 * zero - 1).view(-1, columns).to(torch.uint8)
        codes[start : start + len(rows)] = nibbles(code) if bits == 4 else code
        scales[start : start + len(rows)] = scale.squeeze(2)
        start += len(rows)
    return codes, scales


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes in a byte, the first in the lower half: [rows, columns / 2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def apart(codes: torch.Tensor) -> torch.Tensor:
    """What `nibbles` put together: [rows, columns]."""
    return torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
