"""bfloat16 matrices in oneDNN's blocked layout, reordered once: a matrix-vector product then runs at memory speed."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch


class Reordered:
    """Some rows of a matrix; exact products of bfloat16, sums in float32."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self.rows = sum(map(len, rows))
        self.nbytes = sum(some.numel() for some in rows) * torch.bfloat16.itemsize
        if len(rows) == 1 and rows[0].dtype is torch.bfloat16 and rows[0].is_contiguous():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(rows[0], None)
            return
        # In a mapping of its own: taken from the allocator it would leave holes between the tensors that stay.
        with mmap.mmap(-1, self.nbytes) as scratch:
            joined = torch.frombuffer(scratch, dtype=torch.bfloat16).view(-1, rows[0].shape[1])
            start = 0
            for some in rows:
                joined[start : start + len(some)].copy_(some)
                start += len(some)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(joined, None)
            del joined

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, None, "none", [], "")
        return out
