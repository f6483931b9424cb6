"""Linear modules with rounded weights, filled from tensors that may still be in their files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from peerllm.engine.free_memory import trim
from peerllm.engine.kernels.accelerator import CPU, turn
from peerllm.engine.kernels.products import NBits, Unfolded
from peerllm.engine.model.keeping import Matrix
from peerllm.engine.model.loader import as_array
from peerllm.engine.weights.rounding import block_of, packed_bytes, rounded

PART_WEIGHTS = 16 << 20  # larger matrices are divided, since onnxruntime has a product in memory twice while it is made


class Packed(nn.Module):
    """Replaces a linear module. A bias stays a parameter."""

    def __init__(self, matrix: Matrix, bits: int, device: torch.device) -> None:
        super().__init__()
        self._columns, self._turned, self._bits, self._device = matrix.columns, matrix.turned, bits, device
        self._parts: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self.nbytes = packed_bytes(matrix.rows, matrix.columns, bits)
        self.bias = matrix.bias
        # A model's initialisation may access the weight; marked as loaded, it is left alone.
        self.__dict__["weight"] = torch.empty(0)
        self.weight.__dict__["_is_hf_initialized"] = True

    @property
    def filled(self) -> bool:
        return bool(self._parts)

    def fill(self, weight: torch.Tensor) -> None:
        """Round the matrix part by part: at most one part is in memory twice, and a small piece in float32."""
        block = block_of(self._columns)
        assert block is not None
        rows = weight.t() if self._turned else weight
        for some in torch.split(rows, max(1, PART_WEIGHTS // self._columns)):
            codes, scales = rounded(as_array(some.detach()), self._bits, block)
            with turn(self._device):
                self._parts.append(
                    NBits(codes, scales, self._bits)
                    if self._device == CPU
                    else Unfolded(codes, scales, self._bits, self._device)
                )
            del codes, scales
            trim()  # else memory freed by rounding would stay as holes between the tensors

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply [..., columns] to [..., rows]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        outs = [part(flat) for part in self._parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        if self.bias is not None:
            out += self.bias
        return out.view(*inputs.shape[:-1], out.shape[-1])
