"""onnxruntime's MatMulNBits on torch's memory: weights of 4 or 8 bits, activations rounded to 8 bits block by block.

One session holds one run of rows. Inputs and outputs are bound by address, nothing is copied but to float32 and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peerllm.engine.kernels.forms import block_of, packed_bytes
from peerllm.engine.kernels.graphs import TOKENS, Bound, Graph, make_pool
from peerllm.engine.kernels.rounding import rounded


def maker(bits: int, threads: int) -> Callable[[Sequence[torch.Tensor]], NBits]:
    """Packs rows for products on `threads` threads; the first caller's number holds for the process."""
    make_pool(threads)
    return lambda rows: NBits(rows, bits)


class NBits:
    """Some rows of a matrix."""

    def __init__(self, rows: Sequence[torch.Tensor], bits: int) -> None:
        self.rows, self._columns = sum(map(len, rows)), rows[0].shape[1]
        block = block_of(self._columns)
        assert block is not None
        codes, scales = rounded(rows, bits, block)
        self.nbytes = packed_bytes(self.rows, self._columns, bits)
        graph = Graph()
        graph.rounded_product(graph.given("x", TOKENS, self._columns), "y", codes, scales, bits)
        graph.wanted("y", TOKENS, self.rows)
        self._bound = Bound(graph.session())

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows]."""
        given = inputs.to(torch.float32).contiguous()
        out = torch.empty(len(given), self.rows)
        self._bound.give("x", given)
        self._bound.want("y", out)
        self._bound.run()
        return out.to(inputs.dtype)
