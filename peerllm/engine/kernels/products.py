"""Products with a matrix that `rounding.rounded` rounded, for torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear

from peerllm.engine.graph.nodes import Graph
from peerllm.engine.weights.formats.coded_rows import CodedRows

ROWS_BYTES = 16 << 20  # of rows converted back to the inputs' dtype at once


class NBits:
    """Some rows of a matrix, multiplied by onnxruntime, which rounds inputs to 8 bits, block by block."""

    def __init__(self, codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int) -> None:
        columns = codes.shape[1] * 8 // bits
        graph, rows = Graph(), CodedRows(bits, columns // scales.shape[1], codes, scales)
        out = graph.coded_product(graph.input("x", "n", columns), rows)
        graph.add("Identity", out, output="y")
        graph.output("y", "n", len(codes))
        self._session: Any = graph.session()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows], in the inputs' dtype."""
        (out,) = self._session.run(None, {"x": inputs.to(torch.float32).contiguous().numpy()})
        return torch.from_numpy(out).to(inputs.dtype)


class Unfolded:
    """Some rows of a matrix on an accelerator: stored rounded, and converted to floats a few at a time to multiply.

    This works wherever torch does. It saves memory but no time, since each weight is written and read again.
    """

    def __init__(self, codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, device: torch.device) -> None:
        self._codes, self._scales = (torch.from_numpy(array).to(device) for array in (codes, scales))
        self._bits = bits

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows], in the inputs' dtype."""
        step = max(1, ROWS_BYTES // (inputs.shape[1] * inputs.itemsize))
        outs = [
            linear(inputs, self._rows(codes, scales, inputs.dtype))
            for codes, scales in zip(torch.split(self._codes, step), torch.split(self._scales, step), strict=True)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _rows(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Convert codes and scales to floats [rows, columns]."""
        whole = torch.stack((codes & 15, codes >> 4), dim=2) if self._bits == 4 else codes
        blocks = whole.view(*scales.shape, -1).to(dtype).sub_(1 << (self._bits - 1))  # integers, exact in any dtype
        return blocks.mul_(scales.to(dtype).unsqueeze(2)).flatten(1)
