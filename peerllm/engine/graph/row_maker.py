"""The embedding: token ids to the rows that enter the first block, on the device that the text was typed on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.engine.graph.blocks.builder import normalise
from peerllm.engine.graph.matrix_product import add_product
from peerllm.engine.graph.nodes import Graph
from peerllm.engine.graph.weights import OwnInputs, norm_weights
from peerllm.engine.weights.tensors import CodedTable, Floats, Tensors
from peerllm.errors import EngineError

Table = npt.NDArray[Any] | CodedTable


def make_own_inputs(about: OwnInputs, hidden: int, tensors: Tensors, bits: int) -> Any:
    """Build the session that turns embeddings x [1, n, hidden] and rows of the table [1, n, width] into rows y."""
    graph, width = Graph(), about.width
    x, looked_up = graph.input("x", 1, "n", hidden), graph.input("table", 1, "n", width)
    made = add_product(graph, x, about.projection, tensors, bits)
    made = graph.add("Mul", made, graph.number(hidden**-0.5))
    made = graph.add("Reshape", made, graph.shape(1, -1, width // about.each, about.each))
    made = normalise(graph, made, about.about, *norm_weights(graph, tensors, about.about, about.norm, (about.each,)))
    made = graph.add("Reshape", made, graph.shape(1, -1, width))
    both = graph.add("Mul", graph.add("Add", made, looked_up), graph.number(0.5**0.5))
    graph.add("Concat", x, both, output="y", axis=-1)
    graph.output("y", 1, "n", hidden + width)
    return graph.session()


class Embedding:
    """Looks token ids up in tables that stay in their files, and adds learned positions or the blocks' own inputs."""

    def __init__(
        self, table: Table, scale: float, positions: Floats | None, own: tuple[Table, int, Any] | None = None
    ) -> None:
        """`table` [vocabulary, hidden], `positions` [context, hidden]; `own`: a table, numbers per block, a session."""
        self._table, self._scale, self._positions, self._own = table, np.float32(scale), positions, own

    def check(self, ids: npt.NDArray[Any], count: int) -> None:
        """EngineError unless `ids` are `count` valid token ids."""
        if ids.dtype != np.int64 or ids.shape != (count,) or ids.min() < 0 or ids.max() >= len(self._table):
            raise EngineError(f"token ids are int64 [{count}] from 0 to {len(self._table) - 1}")

    def __call__(self, ids: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> Floats:
        """Embed ids that were checked: float32 [n, width of a row]."""
        x = np.ascontiguousarray(self._table[ids], dtype=np.float32)
        if self._scale != 1.0:
            x = x * self._scale
        if self._own is not None:
            table, each, session = self._own
            known = np.where(ids < len(table), ids, 0)
            looked_up = np.ascontiguousarray(table[known], dtype=np.float32) * np.float32(math.sqrt(each))
            rows: Floats = session.run(None, {"x": x[None], "table": looked_up[None]})[0][0]
            return rows
        return x if self._positions is None else x + self._positions[places]
