"""torch's own packed products, where onnxruntime is not to be had: slower, the same interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad

from peerllm.engine.kernels.forms import Part, block_of
from peerllm.engine.kernels.rounding import apart, rounded

STEP = 16  # the packed layout holds whole numbers of so many rows
TILES = 8  # of the packed layout; on processors any of torch's values gives the same


def maker(bits: int) -> Callable[[Sequence[torch.Tensor]], Part]:
    """Packs rows."""
    return Int4 if bits == 4 else Int8


class Int4:
    """Rows with a scale per block, in torch's layout."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        block = block_of(rows[0].shape[1])
        assert block is not None
        self.rows, self._block = sum(map(len, rows)), block
        packed, scales = (pad(one, (0, 0, 0, -self.rows % STEP)) for one in rounded(rows, 4, block))
        self._scales = torch.stack((scales.t(), torch.zeros_like(scales.t())), dim=2).to(torch.bfloat16).contiguous()
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(apart(packed).int(), TILES)
        self.nbytes = self._packed.nbytes + self._scales.nbytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows]."""
        given = inputs.to(torch.bfloat16).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(given, self._packed, self._block, self._scales)
        return out[:, : self.rows].to(inputs.dtype)


class Int8:
    """Rows with one scale each."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self.rows = sum(map(len, rows))
        codes, scales = rounded(rows, 8, rows[0].shape[1])
        self._codes = (codes.int() - 128).to(torch.int8)
        self._scales = scales.flatten().to(torch.bfloat16)
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows]."""
        given = inputs.to(torch.bfloat16).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int8pack_mm(given, self._codes, self._scales)
        return out.to(inputs.dtype)
