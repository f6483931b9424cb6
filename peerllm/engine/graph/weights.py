"""Which tensors of a checkpoint form which matrix products, norms and experts of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from peerllm.engine.graph.experts import Stacks
from peerllm.engine.graph.matrix_product import Part, Product, require
from peerllm.engine.graph.nodes import Graph
from peerllm.engine.graph.structure import Block, Norm
from peerllm.engine.weights.formats.coded_rows import WeightForm
from peerllm.engine.weights.tensors import Tensors

Names = Mapping[str, str]
Vectors = Mapping[str, tuple[str, tuple[int, ...]]]  # by role: a small tensor, which stays float32, and its shape


@dataclass(frozen=True, slots=True)
class OwnInputs:
    """What makes the inputs that single blocks read: rows of `table` by token id, and a product with the embedding."""

    table: Part
    projection: Product
    norm: str
    about: Norm
    each: int  # numbers for each block

    @property
    def width(self) -> int:
        return self.projection.rows

    def nbytes(self, bits: int) -> int:
        """Memory once they are loaded; the table stays in its file."""
        return self.projection.nbytes(bits) + 4 * self.each

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and least shapes of the tensors."""
        yield from Product((self.table,), self.width).tensors
        yield from self.projection.tensors
        yield f"{self.norm}.weight", (self.each,)


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

    @property
    def forms(self) -> tuple[WeightForm | None, ...]:
        """The forms that products and experts compute with; blocks that differ in them take different times."""
        parts = [part for product in self.products.values() for part in product.parts]
        stacks = () if self.stacks is None or not self.stacks.kept else self.stacks.forms
        return *(part.form if part.kept else None for part in parts), *stacks

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

    def coded_experts(self) -> Iterator[str]:
        """The names of the experts' tensors that are stored in a form."""
        if self.stacks is not None and self.block.mlp.experts is not None:
            yield from (name for name, _ in self.stacks.coded_tensors(self.block.mlp.experts, self.hidden))

    def norms(self) -> Iterator[tuple[str, Norm]]:
        """The norms of the block, its queries and its keys, with their places."""
        yield from self.block.norms
        if self.block.attention is not None and self.block.attention.norm is not None:
            yield "queries", self.block.attention.norm
            if self.block.attention.maker is None:
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
