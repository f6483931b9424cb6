"""onnxruntime's product with rounded weights; inputs are rounded to 8 bits within, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peerllm.engine.graph.nodes import Graph


class NBits:
    """Some rows of a matrix, as `rounding.rounded` made them."""

    def __init__(self, codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int) -> None:
        columns = codes.shape[1] * 8 // bits
        graph = Graph()
        out = graph.rounded_product(graph.input("x", "n", columns), codes, scales, bits)
        graph.add("Identity", out, output="y")
        graph.output("y", "n", len(codes))
        self._session: Any = graph.session()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows], in the inputs' dtype."""
        (out,) = self._session.run(None, {"x": inputs.to(torch.float32).contiguous().numpy()})
        return torch.from_numpy(out).to(inputs.dtype)
