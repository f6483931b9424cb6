"""Large matrices are rounded in pieces: the codes are those of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from peerllm.engine.graph import matrix_product
from peerllm.engine.graph.matrix_product import Part, Product, add_product
from peerllm.engine.graph.nodes import Graph
from peerllm.engine.weights.rounding import rounded
from peerllm.engine.weights.tensors import MadeUp

ROWS, COLUMNS = 24, 64


class Stored:
    """One matrix of a checkpoint, all rows of it different."""

    matrix = np.random.default_rng(1).standard_normal((ROWS, COLUMNS), dtype=np.float32)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return (ROWS, COLUMNS) if name == "a.weight" else None

    def floats(self, name: str, rows: slice, turned: bool = False) -> np.ndarray:
        return self.matrix[rows]


@pytest.mark.parametrize("tensors", [Stored(), MadeUp({"a.weight": (ROWS, COLUMNS)})])
def test_pieces_of_a_matrix_are_rounded_each(monkeypatch: pytest.MonkeyPatch, tensors: Stored | MadeUp) -> None:
    monkeypatch.setattr(matrix_product, "PIECE_BYTES", 8 * 4 * COLUMNS)
    product, made = Product((Part("a", ROWS),), COLUMNS), []
    monkeypatch.setattr(Graph, "coded_product", lambda graph, x, coded, *about: made.append(coded) or "y")
    add_product(Graph(), "x", product, tensors, 8)
    pieces = [tensors.floats("a.weight", slice(start, start + 8)) for start in range(0, ROWS, 8)]
    codes, scales = rounded(np.concatenate(pieces), 8, 64)
    assert (made[0].codes == codes).all() and (made[0].scales == scales).all()


def test_made_up_tensors_of_one_shape_differ() -> None:
    tensors = MadeUp({"a": (8, 64), "b": (8, 64)})
    first, again, other = (tensors.floats(name, slice(None)) for name in "aab")
    assert (first == again).all() and not (first == other).all()
