"""Products with matrices that are made of parts of a checkpoint's tensors, as operators of a graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt

from peerllm.engine.graph.nodes import CONTRIB, Graph
from peerllm.engine.weights.checkpoint import MAX_DIMENSIONS
from peerllm.engine.weights.formats.coded_rows import CodedRows, WeightForm
from peerllm.engine.weights.rounding import BLOCK_BYTES, block_of, rounded
from peerllm.engine.weights.tensors import Floats, Rows, Tensors
from peerllm.errors import ModelError

PIECE_BYTES = 1 << 20  # of float32 rows read at once


@dataclass(frozen=True, slots=True)
class Layout:
    """How a product holds some of its rows: whole numbers of so many bits, or float32 where `bits` is 0."""

    bits: int
    block: int = 0  # numbers that share a scale
    zeros: bool = False
    minima: bool = False
    ordered: bool = False  # the columns' order may be another than the input's

    def nbytes(self, rows: int, columns: int) -> int:
        """Memory of the rows once they are loaded."""
        if not self.bits:
            return rows * columns * 4
        each = BLOCK_BYTES + self.zeros + 4 * self.minima  # of a block
        return rows * columns * self.bits // 8 + rows * (columns // self.block) * each


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor ("….weight", perhaps with "….bias"); `turned`: the file holds them as columns."""

    tensor: str
    count: int
    rows: npt.NDArray[np.int64] | None = None  # row numbers; None: all rows
    turned: bool = False
    bare: bool = False  # the tensor's name has no ".weight"
    form: WeightForm | None = None  # how a quantized checkpoint stores the tensor; None: floats
    kept: bool = False  # products compute with the form's numbers
    whole: int | None = None  # how many rows the tensor has, where `rows` are some of them

    @property
    def name(self) -> str:
        """The name of the matrix, as a float checkpoint has it."""
        return self.tensor if self.bare else f"{self.tensor}.weight"

    def layout(self, columns: int, bits: int) -> Layout:
        """How the part is held where other matrices are rounded to `bits` (0: float32)."""
        form = self.form if self.kept else None
        if bits and form is not None and form.bits:
            return Layout(form.bits, form.block, form.zeros, form.minima, form.ordered)
        block = block_of(columns)
        return Layout(0) if not bits or block is None else Layout(bits, block)

    def some(self, first: int, last: int) -> Rows:
        """The numbers of the tensor's rows that are the part's rows first..last, the last one excluded."""
        return slice(first, last) if self.rows is None else self.rows[first:last]

    def floats(self, tensors: Tensors, columns: int, first: int, last: int) -> Floats:
        """Rows first..last in float32, the last one excluded."""
        rows = self.some(first, last)
        if self.form is None:
            return tensors.floats(self.name, rows, self.turned)
        return tensors.decoded(self.form, self.name, rows, last - first, columns)

    def coded(self, tensors: Tensors, columns: int, first: int, last: int) -> CodedRows:
        """Rows first..last as the file's whole numbers, the last one excluded."""
        assert self.form is not None
        return tensors.coded(self.form, self.name, self.some(first, last), last - first, columns)


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix [rows, columns] made of parts; inputs are multiplied with its rows. `exact`: never rounded (routers)."""

    parts: tuple[Part, ...]
    columns: int
    exact: bool = False

    @property
    def rows(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and least shapes of the product's tensors."""
        for part in self.parts:
            yield from self.part_tensors(part)

    def part_tensors(self, part: Part) -> Iterator[tuple[str, tuple[int, ...]]]:
        least = part.whole or (part.count if part.rows is None else int(part.rows.max()) + 1)
        if part.form is not None:
            yield from part.form.tensors(part.name, least, self.columns)
        else:
            yield part.name, (self.columns, least) if part.turned else (least, self.columns)

    def runs(self, bits: int) -> list[tuple[Layout, Product]]:
        """Consecutive parts that are held alike, each run as a product of its own."""
        alike = groupby(self.parts, lambda part: part.layout(self.columns, 0 if self.exact else bits))
        return [(layout, replace(self, parts=tuple(parts))) for layout, parts in alike]

    def nbytes(self, bits: int) -> int:
        """Memory of the product once it is loaded."""
        return sum(layout.nbytes(run.rows, run.columns) for layout, run in self.runs(bits))


def require(tensors: Tensors, name: str, shape: tuple[int, ...], growing: Collection[int] = ()) -> None:
    """ModelError if a tensor is missing or has another shape; its dimensions `growing` may be larger."""
    found = tensors.shape(name)
    if found is None:
        raise ModelError(f"tensor {name} is missing from the model's files")
    fits = len(found) == len(shape) and all(
        have == need or (place in growing and have > need)
        for place, (have, need) in enumerate(zip(found, shape, strict=True))
    )
    if not fits:
        raise ModelError(f"tensor {name} has shape {list(found)}; the model needs {list(shape)}")


def check(tensors: Tensors, product: Product) -> None:
    """ModelError if a tensor of the product is missing or has another shape; all parts have biases, or none has."""
    biased = any(tensors.shape(f"{part.tensor}.bias") for part in product.parts)
    for part in product.parts:
        growing = () if part.rows is None else (int(part.turned),) if part.form is None else range(MAX_DIMENSIONS)
        for name, least in product.part_tensors(part):
            require(tensors, name, least, growing)
        if not biased or part.bare:
            continue
        if part.form is None and (found := tensors.shape(part.name)) is not None:
            require(tensors, f"{part.tensor}.bias", (found[part.turned],))
        else:
            rows = part.whole or (part.count if part.rows is None else int(part.rows.max()) + 1)
            require(tensors, f"{part.tensor}.bias", (rows,), () if part.rows is None else (0,))


def pieces(product: Product) -> Iterator[tuple[int, Part, int, int]]:
    """The product's rows, PIECE_BYTES of float32 at a time: the first one's number, the part, its rows first..last."""
    step = max(1, PIECE_BYTES // (4 * product.columns))
    start = 0
    for part in product.parts:
        for first in range(0, part.count, step):
            yield start + first, part, first, min(first + step, part.count)
        start += part.count


def bias_of(tensors: Tensors, product: Product) -> Floats | None:
    """The product's bias, float32 [rows]; None if its parts have none."""
    first = product.parts[0]
    if first.bare or tensors.shape(f"{first.tensor}.bias") is None:
        return None
    rows = [slice(None) if part.rows is None else part.rows for part in product.parts]
    return np.concatenate(
        [tensors.floats(f"{part.tensor}.bias", some) for part, some in zip(product.parts, rows, strict=True)]
    )


def add_product(graph: Graph, x: str, product: Product, tensors: Tensors, bits: int) -> str:
    """Add the product of x [b, n, columns] with the matrix: [b, n, rows]."""
    check(tensors, product)
    made = [
        _add_run(graph, x, layout, alike, tensors)
        for layout, run in product.runs(bits)
        for alike in (_by_order(run, tensors) if layout.ordered else [run])
    ]
    return made[0] if len(made) == 1 else graph.add("Concat", *made, axis=-1)


def _add_run(graph: Graph, x: str, layout: Layout, product: Product, tensors: Tensors) -> str:
    """Add the product with a matrix whose parts are all held alike."""
    rows, columns, bias = product.rows, product.columns, bias_of(tensors, product)
    if not layout.bits:
        matrix = np.empty((columns, rows), np.float32)
        for start, part, first, last in pieces(product):
            matrix[:, start : start + last - first] = part.floats(tensors, columns, first, last).T
        out = graph.add("MatMul", x, graph.weight(matrix))
        return out if bias is None else graph.add("Add", out, graph.weight(bias))
    made = coded(product, layout, tensors)
    if made.order is not None:
        x = graph.add("Gather", x, graph.weight(made.order), axis=-1)
    out = graph.coded_product(x, made, "" if bias is None else graph.weight(bias))
    if made.minima is None:
        return out
    # weight = … - minimum: a block's minimum is multiplied with the sum of the block's inputs
    sums = graph.block_sums(x, columns, layout.block)  # [b, n, blocks]
    return graph.add("Sub", out, graph.add("FusedMatMul", sums, graph.weight(made.minima), domain=CONTRIB, transB=1))


def _by_order(product: Product, tensors: Tensors) -> list[Product]:
    """Consecutive parts with the same order of columns, each run as a product of its own."""
    runs: list[tuple[npt.NDArray[np.int64] | None, list[Part]]] = []
    for part in product.parts:
        order = part.coded(tensors, product.columns, 0, 1).order
        if runs and np.array_equal(runs[-1][0], order):  # type: ignore[arg-type]
            runs[-1][1].append(part)
        else:
            runs.append((order, [part]))
    return [replace(product, parts=tuple(parts)) for _, parts in runs]


def coded(product: Product, layout: Layout, tensors: Tensors) -> CodedRows:
    """A product whose parts are all held alike, as whole numbers."""
    rows, blocks = product.rows, product.columns // layout.block
    codes = np.empty((rows, product.columns * layout.bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = np.empty((rows, blocks), np.uint8) if layout.zeros else None
    minima = np.empty((rows, blocks), np.float32) if layout.minima else None
    before, made = None, None
    for start, part, first, last in pieces(product):
        if part.kept and part.form is not None and part.form.bits:
            made = part.coded(tensors, product.columns, first, last).centred()
        else:
            some = part.floats(tensors, product.columns, first, last)
            if some is not before:  # made-up ones come again and again
                before, made = some, CodedRows(layout.bits, layout.block, *rounded(some, layout.bits, layout.block))
        assert made is not None
        where = slice(start, start + last - first)
        codes[where], scales[where] = made.codes, made.scales
        if zeros is not None:
            assert made.zeros is not None
            zeros[where] = made.zeros
        if minima is not None:
            assert made.minima is not None
            minima[where] = made.minima
    assert made is not None
    return CodedRows(layout.bits, layout.block, codes, scales, zeros, minima, made.order)
