"""Which tensors of a checkpoint form which matrix product of a block, and those products as operators of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peerllm.engine.graph.nodes import CONTRIB, Graph
from peerllm.engine.graph.structure import Block, Experts, Norm
from peerllm.engine.graph.tensors import Floats, Tensors
from peerllm.engine.weights.rounding import BLOCK_BYTES, BLOCKS, block_of, rounded
from peerllm.errors import ModelError

PIECE_BYTES = 1 << 20  # of float32 rows read at once
Names = Mapping[str, str]
Vectors = Mapping[str, tuple[str, tuple[int, ...]]]  # by role: a small tensor, which stays float32, and its shape


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor ("….weight", perhaps with "….bias"); `turned`: the file holds them as columns."""

    tensor: str
    count: int
    rows: npt.NDArray[np.int64] | None = None  # row numbers; None: all rows
    turned: bool = False
    bare: bool = False  # the tensor's name has no ".weight"


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
            least = part.count if part.rows is None else int(part.rows.max()) + 1
            shape = (self.columns, least) if part.turned else (least, self.columns)
            yield (part.tensor if part.bare else f"{part.tensor}.weight"), shape

    def nbytes(self, bits: int) -> int:
        """Memory of the product once it is loaded."""
        block = None if self.exact else block_of(self.columns)
        if not bits or block is None:
            return self.rows * self.columns * 4
        return self.rows * self.columns * bits // 8 + self.rows * (self.columns // block) * BLOCK_BYTES


def require(tensors: Tensors, name: str, shape: tuple[int, ...], growing: int | None = None) -> None:
    """ModelError if a tensor is missing or has another shape; its dimension `growing` may be larger."""
    found = tensors.shape(name)
    if found is None:
        raise ModelError(f"tensor {name} is missing from the model's files")
    fits = len(found) == len(shape) and all(
        have == need or (place == growing and have > need)
        for place, (have, need) in enumerate(zip(found, shape, strict=True))
    )
    if not fits:
        raise ModelError(f"tensor {name} has shape {list(found)}; the model needs {list(shape)}")


def check(tensors: Tensors, product: Product) -> None:
    """ModelError if a tensor of the product is missing or has another shape; all parts have biases, or none has."""
    biased = any(tensors.shape(f"{part.tensor}.bias") for part in product.parts)
    for part, (name, least) in zip(product.parts, product.tensors, strict=True):
        require(tensors, name, least, None if part.rows is None else int(part.turned))
        if biased and not part.bare and (found := tensors.shape(name)) is not None:
            require(tensors, f"{part.tensor}.bias", (found[part.turned],))


def pieces(tensors: Tensors, product: Product) -> Iterator[tuple[int, Floats]]:
    """The product's rows as float32 [some, columns], PIECE_BYTES at a time, each with its first row's number."""
    step = max(1, PIECE_BYTES // (4 * product.columns))
    start = 0
    for part in product.parts:
        name = part.tensor if part.bare else f"{part.tensor}.weight"
        for first in range(0, part.count, step):
            last = min(first + step, part.count)
            rows = slice(first, last) if part.rows is None else part.rows[first:last]
            yield start + first, tensors.floats(name, rows, part.turned)
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
    """Add the product of x [..., columns] with the matrix: [..., rows]."""
    check(tensors, product)
    rows, columns = product.rows, product.columns
    block = None if product.exact else block_of(columns)
    bias = bias_of(tensors, product)
    if not bits or block is None:
        matrix = np.empty((columns, rows), np.float32)
        for start, some in pieces(tensors, product):
            matrix[:, start : start + len(some)] = some.T
        out = graph.add("MatMul", x, graph.weight(matrix))
        return out if bias is None else graph.add("Add", out, graph.weight(bias))
    codes = np.empty((rows, columns * bits // 8), np.uint8)
    scales = np.empty((rows, columns // block), np.float32)
    before, made = None, (codes, scales)
    for start, some in pieces(tensors, product):
        if some is not before:  # made-up ones come again and again
            before, made = some, rounded(some, bits, block)
        codes[start : start + len(some)], scales[start : start + len(some)] = made
    return graph.rounded_product(x, codes, scales, bits, "" if bias is None else graph.weight(bias))


@dataclass(frozen=True, slots=True)
class Stacks:
    """The tensors of a block's experts: one for each expert ("mlp.experts.{}.gate_proj"), or stacks `up` and `down`."""

    gate: str
    up: str
    down: str
    # "halves": `up` is [experts, 2I, H], first all of gate, then all of up; `down` is [experts, H, I].
    # "interleaved": `up` is [experts, H, 2I], gate and up alternating; `down` is [experts, I, H]; both have biases.
    form: Literal["each", "interleaved", "halves"] = "each"

    def nbytes(self, experts: Experts, hidden: int, bits: int) -> int:
        numbers = 3 * experts.count * experts.wide * hidden
        block = experts_block(experts, hidden, bits)
        return numbers * 4 if block is None else numbers * bits // 8 + numbers // block * BLOCK_BYTES

    def tensors(self, experts: Experts, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the experts' tensors."""
        count, wide = experts.count, experts.wide
        if self.form == "interleaved":
            yield self.up, (count, hidden, 2 * wide)
            yield f"{self.up}_bias", (count, 2 * wide)
            yield self.down, (count, wide, hidden)
            yield f"{self.down}_bias", (count, hidden)
        elif self.form == "halves":
            yield self.up, (count, 2 * wide, hidden)
            yield self.down, (count, hidden, wide)
        else:
            for number in range(count):
                yield f"{self.gate.format(number)}.weight", (wide, hidden)
                yield f"{self.up.format(number)}.weight", (wide, hidden)
                yield f"{self.down.format(number)}.weight", (hidden, wide)

    def first(self, tensors: Tensors, experts: Experts, number: int) -> Floats:
        """Gate and up of one expert, rows alternating: [2I, H]."""
        if self.form == "interleaved":
            return np.ascontiguousarray(tensors.floats(self.up, number).T)
        if self.form == "halves":
            both = tensors.floats(self.up, number).reshape(2, experts.wide, -1)
        else:
            names = [f"{name.format(number)}.weight" for name in (self.gate, self.up)]
            both = np.stack([tensors.floats(name, slice(None)) for name in names])
        return both.swapaxes(0, 1).reshape(2 * experts.wide, -1)

    def second(self, tensors: Tensors, number: int) -> Floats:
        """Down of one expert: [H, I]."""
        if self.form == "each":
            return tensors.floats(f"{self.down.format(number)}.weight", slice(None))
        made = tensors.floats(self.down, number)
        return np.ascontiguousarray(made.T) if self.form == "interleaved" else made


def experts_block(experts: Experts, hidden: int, bits: int) -> int | None:
    """How many weights of an expert share a scale; None: experts stay in float32."""
    return next((block for block in BLOCKS if bits and not hidden % block and not experts.wide % block), None)


def add_experts(
    graph: Graph, rows: str, scores: str, experts: Experts, stacks: Stacks, hidden: int, tensors: Tensors, bits: int
) -> str:
    """Send rows [n, H] through the experts that scores [n, experts] choose; only those experts are computed."""
    for name, shape in stacks.tensors(experts, hidden):
        require(tensors, name, shape)
    block = experts_block(experts, hidden, bits)
    layers: list[tuple[int, int, Callable[[int], Floats], str]] = [
        (2 * experts.wide, hidden, lambda number: stacks.first(tensors, experts, number), f"{stacks.up}_bias"),
        (hidden, experts.wide, lambda number: stacks.second(tensors, number), f"{stacks.down}_bias"),
    ]
    inputs = [rows, scores]
    for count, columns, read, bias in layers:
        if block is None:
            stack = np.empty((experts.count, count, columns), np.float32)
            for number in range(experts.count):
                stack[number] = read(number)
            inputs.append(graph.weight(stack))
        else:
            codes = np.empty((experts.count, count, columns * bits // 8), np.uint8)
            scales = np.empty((experts.count, count, columns // block), np.float32)
            for number in range(experts.count):
                codes[number], scales[number] = rounded(read(number), bits, block)
            inputs += [graph.weight(codes), graph.weight(scales)]
        inputs.append(graph.weight(tensors.floats(bias, slice(None))) if stacks.form == "interleaved" else "")
    about: dict[str, Any] = {
        "k": experts.used, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": experts.alpha,
        "activation_beta": experts.beta,
        "normalize_routing_weights": int(experts.normalised or experts.routing is not None),
    }  # fmt: skip
    if experts.limit:
        about["swiglu_limit"] = experts.limit
    if block is None:
        return graph.add("MoE", *inputs, domain=CONTRIB, **about)
    return graph.add("QMoE", *inputs, domain=CONTRIB, expert_weight_bits=bits, block_size=block, **about)


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One block's tensors: its products and small tensors by role, and the names of its norms and sinks."""

    block: Block
    hidden: int
    products: Mapping[str, Product]
    names: Names
    stacks: Stacks | None = None
    vectors: Vectors = field(default_factory=dict)

    def nbytes(self, bits: int) -> int:
        """Memory of the block's weights once they are loaded."""
        experts = self.block.mlp.experts
        stacks = 0 if experts is None or self.stacks is None else self.stacks.nbytes(experts, self.hidden, bits)
        vectors = 4 * self.hidden * len(self.block.norms) + 4 * sum(prod(shape) for _, shape in self.vectors.values())
        return stacks + vectors + sum(product.nbytes(bits) for product in self.products.values())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and least shapes of all tensors that a checkpoint must have (biases are optional)."""
        for product in self.products.values():
            yield from product.tensors
        if self.stacks is not None and self.block.mlp.experts is not None:
            yield from self.stacks.tensors(self.block.mlp.experts, self.hidden)
        for place, norm in self.norms():
            if norm.weighted:
                yield from norm_tensors(self.names[place], self.norm_shape(place))
        yield from self.vectors.values()
        if self.block.attention is not None and self.block.attention.sinks:
            yield self.names["sinks"], (self.block.attention.heads,)

    def norms(self) -> Iterator[tuple[str, Norm]]:
        """The norms of the block, its queries and its keys, with their places."""
        yield from self.block.norms
        if self.block.attention is not None and self.block.attention.norm is not None:
            yield "queries", self.block.attention.norm
            yield "keys", self.block.attention.norm

    def norm_shape(self, place: str) -> tuple[int, ...]:
        about = self.block.attention
        if about is None or place not in ("queries", "keys"):
            return (self.hidden,)
        heads = about.heads if place == "queries" else about.groups
        return {"head": (about.width,), "each": (heads, about.width), "heads": (heads * about.width,)}[about.norm_over]


def norm_tensors(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a norm's weight: one tensor, or one for each head where the name has "{}"."""
    if "{}" not in name:
        return [(f"{name}.weight", shape)]
    return [(f"{name.format(head)}.weight", shape[1:]) for head in range(shape[0])]


def norm_weights(graph: Graph, tensors: Tensors, norm: Norm, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """Add a norm's weight (with its offset; ones if the model has none) and bias to the graph; "" for no bias."""
    weight = np.ones(shape, np.float32)
    if norm.weighted:
        parts = norm_tensors(name, shape)
        for part, least in parts:
            require(tensors, part, least)
        weight = np.concatenate([tensors.floats(part, slice(None)) for part, _ in parts]).reshape(shape)
        weight += np.float32(norm.offset)
    if bias := tensors.shape(f"{name}.bias") is not None:
        require(tensors, f"{name}.bias", shape)
    return graph.weight(weight), graph.weight(tensors.floats(f"{name}.bias", slice(None))) if bias else ""
