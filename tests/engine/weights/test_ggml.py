"""GGML's block types: the numbers are those that the gguf library reads, and products are near those in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from peerllm.engine.graph.matrix_product import Part, Product, add_product
from peerllm.engine.graph.nodes import Graph, make_pool
from peerllm.engine.weights.formats.ggml import GGMLForm
from peerllm.engine.weights.formats.ggml_blocks import BLOCK_TYPES
from peerllm.engine.weights.tensors import Checkpoint
from peerllm.errors import ModelError
from tests.engine.weights.ggml_tensors import File, blocks_of, read

ROWS, COLUMNS = 37, 512
KINDS = list(BLOCK_TYPES)


def checkpoint(path: Path, kind: str, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Checkpoint, np.ndarray]:
    """A checkpoint of one tensor "a.weight", and its numbers."""
    file, blocks = File(path), blocks_of(kind, rows, columns)
    file.add("model.a.weight", kind, (rows, columns), blocks)
    return Checkpoint(file.tensors), read(kind, blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_that_the_library_reads(kind: str, tmp_path: Path) -> None:
    tensors, numbers = checkpoint(tmp_path / "file", kind)
    form = GGMLForm(kind)
    assert np.array_equal(form.floats(tensors, "a.weight", slice(None)), numbers), "bit for bit"
    some = np.array([ROWS - 1, 0, 5])
    assert np.array_equal(form.floats(tensors, "a.weight", some), numbers[some])
    coded = form.coded(tensors, "a.weight", slice(3, 8))
    assert (coded.bits, coded.block) == (form.bits, form.block)
    assert (coded.zeros is not None, coded.minima is not None) == (form.zeros, form.minima)
    assert len(coded.codes) == 5 and np.array_equal(coded.floats(), numbers[3:8])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_near_those_in_float64(kind: str, count: int, tmp_path: Path) -> None:
    tensors, numbers = checkpoint(tmp_path / "file", kind)
    make_pool(1)
    order = np.random.default_rng(0).permutation(ROWS)
    graph = Graph()
    product = Product((Part("a", ROWS, order, form=GGMLForm(kind), kept=True),), COLUMNS)
    out = add_product(graph, graph.input("x", 1, "n", COLUMNS), product, tensors, 8)
    graph.add("Identity", out, output="y")
    graph.output("y", 1, "n", ROWS)
    # Inputs of whole numbers up to 127 are not rounded to 8 bits: what is left are float32 sums.
    x = np.random.default_rng(1).integers(-126, 127, (1, count, COLUMNS)).astype(np.float32)
    x[:, :, ::16] = 127
    (y,) = graph.session().run(None, {"x": x})
    exact = x[0].astype(np.float64) @ numbers[order].astype(np.float64).T
    summed = np.abs(x[0].astype(np.float64)) @ np.abs(numbers[order].astype(np.float64)).T
    assert (np.abs(y[0] - exact) <= 1e-6 * summed).all()


def test_what_is_no_such_tensor_is_refused(tmp_path: Path) -> None:
    tensors, _ = checkpoint(tmp_path / "file", "Q4_0")
    with pytest.raises(ModelError, match=r"a\.weight is no matrix of type Q6_K"):
        GGMLForm("Q6_K").floats(tensors, "a.weight", slice(None))
    with pytest.raises(ModelError, match="'Q9_Z' are not computed"):
        GGMLForm("Q9_Z")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if GGMLForm(kind).minima])
def test_zeros_take_up_what_they_can_of_the_minima(kind: str, tmp_path: Path) -> None:
    tensors, numbers = checkpoint(tmp_path / "file", kind)
    stored = GGMLForm(kind).coded(tensors, "a.weight", slice(None))
    made = stored.centred()
    assert made.minima is not None and stored.minima is not None
    widest = np.abs(stored.minima).max() + 32 * np.abs(stored.scales).max()
    assert np.abs(made.floats() - numbers).max() <= 1e-6 * widest
    with np.errstate(all="ignore"):
        places = stored.minima / stored.scales
    reached = (places >= 0) & (places <= (15 if stored.zeros is not None else 1 << (stored.bits - 1)))
    assert reached.any()
    assert (np.abs(made.minima[reached]) <= 0.5001 * np.abs(made.scales[reached])).all()
    assert np.array_equal(made.minima[places < 0], stored.minima[places < 0])


def test_inputs_rounded_to_8_bits_err_no_more_for_minima(tmp_path: Path) -> None:
    """Weights about 0 in blocks with a minimum, as files hold them; without centred zeros the error is 1.7 %."""
    rng = np.random.default_rng(0)
    blocks = quantize(rng.standard_normal((64, COLUMNS)).astype(np.float32), GGMLQuantizationType.Q4_1)
    file = File(tmp_path / "file")
    file.add("model.a.weight", "Q4_1", (64, COLUMNS), blocks)
    make_pool(1)
    graph = Graph()
    product = Product((Part("a", 64, form=GGMLForm("Q4_1"), kept=True),), COLUMNS)
    out = add_product(graph, graph.input("x", 1, "n", COLUMNS), product, Checkpoint(file.tensors), 8)
    graph.add("Identity", out, output="y")
    graph.output("y", 1, "n", 64)
    x = rng.standard_normal((1, 8, COLUMNS)).astype(np.float32)
    (y,) = graph.session().run(None, {"x": x})
    exact = x[0] @ read("Q4_1", blocks).T
    error = np.sqrt(np.square(y[0] - exact).mean() / np.square(exact).mean())
    assert error < 0.007
