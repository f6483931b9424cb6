"""What the parts of a block are built with: its graph, weights, rotations and what it keeps of a sequence."""

from __future__ import annotations

import numpy as np

from peerllm.engine.graph.matrix_product import add_product, check, pieces, require
from peerllm.engine.graph.nodes import CONTRIB, Graph
from peerllm.engine.graph.structure import Norm, Placement, Rope
from peerllm.engine.graph.weights import BlockWeights, norm_weights
from peerllm.engine.weights.tensors import Floats, Tensors


class Builder:
    """Adds operators of block `number` to a graph, with weights from `tensors` rounded to `bits` (0: float32)."""

    def __init__(
        self, graph: Graph, weights: BlockWeights, tensors: Tensors, bits: int, context: int,
        windows: tuple[int | None, ...], number: int,
    ) -> None:  # fmt: skip
        """`context`: the number of positions; `windows`: those of the whole model."""
        self.graph, self.weights, self.tensors, self.bits = graph, weights, tensors, bits
        self.context, self.windows, self.number = context, windows, number
        self.half = bool(bits)  # keys and values are float16 where weights are rounded anyway
        self._kept = weights.block.read(self.half)
        attention = weights.block.attention
        self.maker = number if attention is None or attention.maker is None else attention.maker

    def product(self, role: str, x: str) -> str:
        """The product of x with the matrix that has this role in the block."""
        return add_product(self.graph, x, self.weights.products[role], self.tensors, self.bits)

    def matrix(self, role: str) -> Floats:
        """The matrix that has this role in the block, in float32 [rows, columns]."""
        product = self.weights.products[role]
        check(self.tensors, product)
        read = [part.floats(self.tensors, product.columns, first, last) for _, part, first, last in pieces(product)]
        return np.concatenate(read)

    def vector(self, role: str) -> Floats:
        """The small tensor that has this role in the block."""
        name, shape = self.weights.vectors[role]
        require(self.tensors, name, shape)
        return self.tensors.floats(name, slice(None))

    def bias(self, role: str) -> str:
        """The bias beside the small tensor "….weight" of this role, as a weight of the graph; "" if there is none."""
        name = self.weights.vectors[role][0].removesuffix("weight") + "bias"
        if self.tensors.shape(name) is None:
            return ""
        require(self.tensors, name, self.weights.vectors[role][1][:1])
        return self.graph.weight(self.tensors.floats(name, slice(None)))

    def state(self, name: str, written: str = "new") -> tuple[str, str]:
        """Declare an array that the block reads: its input, and the output "new …" that is bound to the same memory."""
        state, full = self._kept, f"{name} {self.maker}"
        shapes = {kept.name: ((kept.heads, state.room(self.context), kept.width), kept.dtype) for kept in state.tokens}
        shape, dtype = (shapes | {fixed.name: (fixed.shape, fixed.dtype) for fixed in state.fixed})[name]
        self.graph.output(f"{written} {full}", "b", *shape, dtype=dtype)
        return self.graph.input(full, "b", *shape, dtype=dtype), f"{written} {full}"

    def normed(self, x: str, place: Placement) -> str:
        """x, normalised if the block has a norm at that place."""
        norm = self.weights.block.norm(place)
        return x if norm is None else self.normalise(x, norm, place)

    def normalise(self, x: str, norm: Norm, place: str) -> str:
        weights = self.weights
        made = norm_weights(self.graph, self.tensors, norm, weights.names[place], weights.norm_shape(place))
        return normalise(self.graph, x, norm, *made)

    def heads_normed(self, x: str, norm: Norm, place: str, heads: int, width: int) -> str:
        """x [b, n, heads · width], each head normalised by itself."""
        graph = self.graph
        apart = graph.add("Reshape", x, graph.shape(0, -1, heads, width))  # [b, n, heads, w]
        own = norm.weighted
        apart = self.normalise(apart, norm, place) if own else rms(graph, apart, ones(graph, width), norm.eps)
        return graph.add("Reshape", apart, graph.shape(0, -1, heads * width))

    def tables(self, rope: Rope, half: bool = False) -> list[str]:
        """Cosines and sines of all positions [context, rotated / 2]."""
        dtype = "float16" if half else "float32"
        return [
            self.graph.input(f"{what} {dtype} {rope_name(rope)}", self.context, rope.width // 2, dtype=dtype)
            for what in ("cos", "sin")
        ]

    def rotated(self, x: str, rope: Rope, heads: int) -> str:
        """x [b, n, heads · w], each head rotated by its token's position."""
        return self.graph.add(
            "RotaryEmbedding", x, self.places(), *self.tables(rope), domain=CONTRIB,
            num_heads=heads, rotary_embedding_dim=rope.width, interleaved=int(rope.interleaved),
        )  # fmt: skip

    def places(self) -> str:
        """Each token's position [b, n]."""
        return self.graph.input("positions", "b", "n", dtype="int64")

    def held(self) -> list[str]:
        """Where in its room each sequence's last token is, and how many tokens the longest has there."""
        group = self.windows.index(self._kept.window)
        return [
            self.graph.input(f"last {group}", "b", dtype="int32"),
            self.graph.input(f"total {group}", 1, dtype="int32"),
        ]


def rope_name(rope: Rope) -> str:
    """The name under which graphs and shard know a rotation's tables; equal rotations have equal names."""
    scaling = ",".join(f"{key}={value}" for key, value in rope.scaling)
    return f"{rope.width}/{rope.theta}/{scaling}"


def normalise(graph: Graph, x: str, norm: Norm, weight: str, bias: str) -> str:
    """Normalise x over its last dimension."""
    if norm.kind == "rms":
        return rms(graph, x, weight, norm.eps)
    inputs = (x, weight, bias) if bias else (x, weight)
    return graph.add("LayerNormalization", *inputs, axis=-1, epsilon=norm.eps)


def rms(graph: Graph, x: str, weight: str, eps: float) -> str:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension."""
    return graph.add("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)


def ones(graph: Graph, count: int, value: float = 1.0) -> str:
    """A vector of equal numbers, as a weight of the graph."""
    return graph.weight(np.full(count, value, np.float32))
