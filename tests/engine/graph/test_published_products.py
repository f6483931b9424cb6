"""Products with published matrices compute with their whole numbers, not with numbers rounded from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from peerllm.engine.graph.experts import Stacks, add_experts
from peerllm.engine.graph.matrix_product import Part, Product, add_product
from peerllm.engine.graph.nodes import Graph, make_pool
from peerllm.engine.graph.structure import Experts
from peerllm.engine.messages import TensorAt
from peerllm.engine.weights.formats.coded_rows import CodedRows, Floats, Rows, WeightForm
from peerllm.engine.weights.formats.published import published_forms
from peerllm.engine.weights.settled import settled
from peerllm.errors import ModelError
from tests.engine.quantising import CODES
from tests.engine.weights.packers import METHODS, MXFP4, Array, mxfp4

COLUMNS, WIDE, COUNT, TOKENS = 192, 96, 4, 5
CONFIG = {"model_type": "llama", "hidden_size": COLUMNS, "moe_intermediate_size": WIDE}
WHOLE = [name for name, method in METHODS.items() if method.bits]


@pytest.fixture(autouse=True, scope="module")
def _pool() -> None:
    make_pool(1)


class Matrices:
    """Implements Tensors for random matrices stored by a method; what they stand for is in `weights`."""

    def __init__(self, method: str, sizes: dict[str, tuple[int, int]], seeds: dict[str, int] | None = None) -> None:
        self.arrays: dict[str, Array] = {}
        self.weights: dict[str, npt.NDArray[np.float64]] = {}
        for number, (name, size) in enumerate(sizes.items()):
            drawn = np.random.default_rng((seeds or {}).get(name, number)).standard_normal(size)
            made = METHODS[method].store(drawn)
            self.weights[name] = made.weights
            self.arrays |= {f"{name}.{kind}": array for kind, array in made.tensors.items()}
        listed = [(name, _at(name, array)) for name, array in self.arrays.items()]
        self.about = settled({"quantization_config": METHODS[method].about}, listed)["quantization_config"]
        form = published_forms(self.about, CONFIG)("a.weight")
        assert form is not None
        self.form = form

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.arrays[name].shape if name in self.arrays else None

    def floats(self, name: str, rows: Rows | int, turned: bool = False) -> Floats:
        return np.asarray(self.arrays[name][rows], np.float32)

    def stored(self, name: str) -> npt.NDArray[Any]:
        return self.arrays[name]

    def coded(self, form: WeightForm, name: str, rows: Rows, count: int, columns: int) -> CodedRows:
        return form.coded(self, name, rows)

    def decoded(self, form: WeightForm, name: str, rows: Rows, count: int, columns: int) -> Floats:
        return form.floats(self, name, rows)


def _at(name: str, array: Array) -> TensorAt:
    return TensorAt(name, CODES[array.dtype.name], array.shape, "", 0, array.nbytes)


def inputs() -> npt.NDArray[np.float32]:
    """What rounding activations to 8 bits does not change, in blocks of any columns."""
    return np.random.default_rng(0).choice((-1.0, 0.0, 1.0), (1, TOKENS, COLUMNS)).astype(np.float32)


def product_of(parts: tuple[Part, ...], tensors: Matrices) -> npt.NDArray[np.float32]:
    graph = Graph()
    x = graph.input("x", "b", "n", COLUMNS)
    out = add_product(graph, x, Product(parts, COLUMNS), tensors, 8)
    graph.node("Identity", [out], ["y"])
    graph.output("y", "b", "n", sum(part.count for part in parts))
    return np.asarray(graph.session().run(None, {"x": inputs()})[0])


def close(got: Array, wanted: Array, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("method", WHOLE)
def test_products_are_those_of_the_files_whole_numbers(method: str) -> None:
    tensors = Matrices(method, {"a": (40, COLUMNS), "b": (24, COLUMNS), "c": (16, COLUMNS)})
    rows = np.array([3, 17, 5, 5, 22])
    parts = (
        Part("a", 40, form=tensors.form, kept=True), Part("b", 5, rows, form=tensors.form, kept=True),
        Part("c", 16, form=tensors.form, kept=True),
    )  # fmt: skip
    whole = np.concatenate([tensors.weights["a"], tensors.weights["b"][rows], tensors.weights["c"]])
    assert close(product_of(parts, tensors), inputs().astype(np.float64) @ whole.T)


@pytest.mark.parametrize("method", ["GPTQ 4 bits", "GPTQ 8 bits, in order of activations"])
def test_rounding_again_would_be_seen(method: str) -> None:
    tensors = Matrices(method, {"a": (40, COLUMNS)})
    again = product_of((Part("a", 40, form=tensors.form),), tensors)
    assert not close(again, inputs().astype(np.float64) @ tensors.weights["a"].T, 1e-4)
    assert close(again, inputs().astype(np.float64) @ tensors.weights["a"].T, 1e-1)


def test_parts_with_one_order_of_columns_are_one_product() -> None:
    method = "GPTQ 4 bits, in order of activations"
    tensors = Matrices(method, {"a": (40, COLUMNS), "b": (24, COLUMNS)})
    gathered = []

    class Counting(Graph):
        def add(self, kind: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
            gathered.extend([kind] * (kind == "Gather"))
            return super().add(kind, *inputs, domain=domain, output=output, **attributes)

    parts = tuple(Part(name, rows, form=tensors.form, kept=True) for name, rows in (("a", 40), ("b", 24)))
    for expected in (1, 2):
        graph = Counting()
        add_product(graph, graph.input("x", "b", "n", COLUMNS), Product(parts, COLUMNS), tensors, 8)
        assert gathered == ["Gather"] * expected
        gathered.clear()
        tensors.arrays["b.g_idx"] = np.roll(tensors.arrays["b.g_idx"], 1)


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_those_of_the_files_whole_numbers(method: str) -> None:
    sizes = {"gate": (WIDE, COLUMNS), "up": (WIDE, COLUMNS), "down": (COLUMNS, WIDE)}
    names = {f"{number}.{which}": size for number in range(COUNT) for which, size in sizes.items()}
    tensors = Matrices(method, names)
    stacks = Stacks("{}.gate", "{}.up", "{}.down", "each", (tensors.form,) * 3, kept=True)
    wanted = lambda number, which: tensors.weights[f"{number}.{which}"]  # noqa: E731
    rounded_again = tensors.form.ordered or not tensors.form.bits
    check_experts(stacks, tensors, wanted, 0.04)
    layout = stacks.layout(EXPERTS, COLUMNS, 8)
    assert layout.bits == (8 if rounded_again else tensors.form.bits)
    assert layout.zeros == (tensors.form.zeros and not rounded_again)


EXPERTS = Experts(COUNT, 2, WIDE)


def check_experts(stacks: Stacks, tensors: Any, weights: Any, tolerance: float) -> None:
    """In float32 they are the definition; from whole numbers as near as 8-bit activations allow."""
    x = inputs()[0]
    scores = np.random.default_rng(3).standard_normal((TOKENS, COUNT)).astype(np.float32)
    wanted = np.zeros((TOKENS, COLUMNS))
    for token in range(TOKENS):
        chosen = np.argsort(-scores[token])[:2]
        shares = np.exp(scores[token][chosen].astype(np.float64))
        for number, share in zip(chosen, shares / shares.sum(), strict=True):
            gate, up = (weights(number, which) @ x[token].astype(np.float64) for which in ("gate", "up"))
            wanted[token] += share * (weights(number, "down") @ (gate / (1 + np.exp(-gate)) * up))
    for bits, most in ((0, 1e-5), (8, tolerance)):
        graph = Graph()
        rows, chances = graph.input("x", "n", COLUMNS), graph.input("s", "n", COUNT)
        out = add_experts(graph, rows, chances, EXPERTS, stacks, COLUMNS, tensors, bits)
        graph.node("Identity", [out], ["y"])
        graph.output("y", "n", COLUMNS)
        assert close(graph.session().run(None, {"x": x, "s": scores})[0], wanted, most), bits


def test_whole_numbers_of_experts_are_the_files() -> None:
    """8-bit experts round activations, which hides much: their numbers are looked at."""
    sizes = {f"{n}.{which}": (WIDE, COLUMNS) for n in range(COUNT) for which in ("gate", "up")}
    for method in WHOLE:
        tensors = Matrices(method, {**sizes, **{f"{n}.down": (COLUMNS, WIDE) for n in range(COUNT)}})
        if tensors.form.ordered:
            continue
        stacks = Stacks("{}.gate", "{}.up", "{}.down", "each", (tensors.form,) * 3, kept=True)
        layout = stacks.layout(EXPERTS, COLUMNS, 8)
        both = stacks.coded(tensors, EXPERTS, COLUMNS, 2, 0, layout).floats()
        np.testing.assert_array_equal(both[0::2], tensors.weights["2.gate"].astype(np.float32))
        np.testing.assert_array_equal(both[1::2], tensors.weights["2.up"].astype(np.float32))
        down = stacks.coded(tensors, EXPERTS, COLUMNS, 1, 1, layout).floats()
        np.testing.assert_array_equal(down, tensors.weights["1.down"].astype(np.float32))


def test_stacks_of_four_bit_floats() -> None:
    drawn = np.random.default_rng(0)
    up, down = (
        mxfp4(drawn.standard_normal((COUNT, 2 * WIDE, COLUMNS))),
        mxfp4(drawn.standard_normal((COUNT, COLUMNS, WIDE))),
    )
    tensors = Matrices("FP8", {"a": (1, 1)})
    tensors.arrays = {f"up{kind}": array for kind, array in up.tensors.items()}
    tensors.arrays |= {f"down{kind}": array for kind, array in down.tensors.items()}
    tensors.arrays |= {"up_bias": np.zeros((COUNT, 2 * WIDE), "f4"), "down_bias": np.zeros((COUNT, COLUMNS), "f4")}
    form = published_forms(MXFP4, {"model_type": "gpt_oss", "num_local_experts": COUNT})("a.experts.down_proj")
    stacks = Stacks("", "up", "down", "interleaved", (None, form, form), kept=True)
    parts = {"gate": up.weights[:, 0::2], "up": up.weights[:, 1::2], "down": down.weights}
    check_experts(stacks, tensors, lambda number, which: parts[which][number], 0.04)
    layout = stacks.layout(EXPERTS, COLUMNS, 8)
    assert (layout.bits, layout.block, layout.zeros) == (8, 32, False)
    assert (stacks.coded(tensors, EXPERTS, COLUMNS, 3, 0, layout).floats() == up.weights[3]).all()
    assert (stacks.coded(tensors, EXPERTS, COLUMNS, 3, 1, layout).floats() == down.weights[3]).all()


@pytest.mark.parametrize("bias", [None, np.zeros(39, np.float32)])
def test_a_bias_must_fit_its_quantized_matrix(bias: Array | None) -> None:
    tensors = Matrices("GPTQ 4 bits", {"a": (40, COLUMNS), "b": (24, COLUMNS)})
    tensors.arrays["b.bias"] = np.zeros(24, np.float32)
    if bias is not None:
        tensors.arrays["a.bias"] = bias
    parts = tuple(Part(name, rows, form=tensors.form, kept=True) for name, rows in (("a", 40), ("b", 24)))
    with pytest.raises(ModelError, match=r"tensor a\.bias"):
        product_of(parts, tensors)
