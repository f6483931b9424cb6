"""A decoder block as operators, top to bottom, for b sequences of n tokens each; either b or n is 1.

Trailing comments give shapes: H hidden, h heads, g groups of keys and values, w head width, I feed-forward width.
"""

from __future__ import annotations

import numpy as np

from peerllm.engine.graph.experts import add_experts
from peerllm.engine.graph.matrix_product import add_product, require
from peerllm.engine.graph.nodes import CONTRIB, Graph
from peerllm.engine.graph.structure import Activation, Attention, Experts, Norm, Placement, Rope
from peerllm.engine.graph.weights import BlockWeights, norm_weights
from peerllm.engine.weights.tensors import Tensors

KEPT = ("keys", "values")
INSIDE = 16  # if a head's width and its rotated part are multiples of this, the attention operator rotates it


class BlockGraph:
    """Adds one block to a graph, with weights from `tensors` rounded to `bits` (0: float32)."""

    def __init__(
        self, graph: Graph, weights: BlockWeights, tensors: Tensors, bits: int, context: int,
        windows: tuple[int | None, ...],
    ) -> None:  # fmt: skip
        """`context`: the number of positions; `windows`: those of the whole model."""
        self._graph, self._weights, self._tensors, self._bits = graph, weights, tensors, bits
        self._context, self._windows = context, windows
        self._half = bool(bits)  # keys and values are float16 where weights are rounded anyway
        self._block, self._hidden = weights.block, weights.hidden

    def add(self, x: str, number: int, room: int) -> str:
        """Apply block `number` to x [b, n, H]; a slot has room for keys and values of `room` tokens."""
        block = self._block
        entering = self._normed(x, "before attention")  # [b, n, H]
        taken = self._attended(entering, number, room)  # [b, n, h·w]
        taken = self._normed(self._product("out", taken), "after attention")
        if block.parallel:
            reading = self._normed(x, "before mlp") if block.norm("before mlp") else entering
            made = self._normed(self._fed(reading), "after mlp")
            return self._plus(x, self._graph.add("Add", taken, made))
        middle = self._plus(x, taken)  # [b, n, H]
        made = self._normed(self._fed(self._normed(middle, "before mlp")), "after mlp")
        return self._plus(middle, made)

    def _product(self, role: str, x: str) -> str:
        return add_product(self._graph, x, self._weights.products[role], self._tensors, self._bits)

    def _plus(self, x: str, delta: str) -> str:
        graph = self._graph
        if self._block.residual != 1.0:
            delta = graph.add("Mul", delta, graph.number(self._block.residual))
        return graph.add("Add", x, delta)

    def _normed(self, x: str, place: Placement) -> str:
        norm = self._block.norm(place)
        return x if norm is None else self._normalise(x, norm, place)

    def _normalise(self, x: str, norm: Norm, place: str) -> str:
        weights = self._weights
        made = norm_weights(self._graph, self._tensors, norm, weights.names[place], weights.norm_shape(place))
        return normalise(self._graph, x, norm, *made)

    # ---- attention --------------------------------------------------------------------------------------------------

    def _attended(self, x: str, number: int, room: int) -> str:
        """Attention: x [b, n, H] to [b, n, h·w]; keys and values are appended to the slots in place."""
        graph, about = self._graph, self._block.attention
        width = about.width
        made = self._product("qkv", x)  # [b, n, (h + 2g)·w]
        if about.clip is not None:
            made = graph.add("Clip", made, graph.number(-about.clip), graph.number(about.clip))
        inside = about.rope is not None and about.norm is None and width % INSIDE == 0 == about.rope.width % INSIDE
        given = [made, "", ""]
        if about.norm is not None or (about.rope is not None and not inside):
            sizes = (about.heads * width, about.groups * width, about.groups * width)
            queries, keys, values = graph.split(made, sizes)
            turned = [
                self._turned(part, about, heads, place)
                for part, heads, place in ((queries, about.heads, "queries"), (keys, about.groups, "keys"))
            ]
            given = [*turned, values]
        dtype = "float16" if self._half else "float32"
        if self._half:
            given = [graph.add("Cast", part, to=10) if part else "" for part in given]
        group = self._windows.index(about.window)
        stored = [graph.input(f"{what} {number}", "b", about.groups, room, width, dtype=dtype) for what in KEPT]
        seen = [graph.input(f"last {group}", "b", dtype="int32"), graph.input(f"total {group}", 1, dtype="int32")]
        rotation = [*self._tables(about.rope, half=self._half), self._places()] if inside else ["", "", ""]
        inputs = [*given, *stored, *seen, *rotation, "", self._sinks() if about.sinks else ""]
        outputs = [f"attended {number}", *(f"new {what} {number}" for what in KEPT)]
        rotary = {"do_rotary": 1, "rotary_interleaved": int(about.rope.interleaved)} if inside and about.rope else {}
        graph.node(
            "GroupQueryAttention", inputs, outputs, CONTRIB, num_heads=about.heads, kv_num_heads=about.groups,
            scale=about.scale, softcap=about.softcap, local_window_size=about.window or -1, **rotary,
        )  # fmt: skip
        for name in outputs[1:]:
            graph.output(name, "b", about.groups, room, width, dtype=dtype)
        return graph.add("Cast", outputs[0], to=1) if self._half else outputs[0]

    def _sinks(self) -> str:
        """Attention sinks [h]: scores that take part in the softmax and contribute no value."""
        name = self._weights.names["sinks"]
        require(self._tensors, name, (self._block.attention.heads,))
        made = self._tensors.floats(name, slice(None))
        return self._graph.weight(made.astype(np.float16) if self._half else made)

    def _turned(self, x: str, about: Attention, heads: int, place: str) -> str:
        """Queries or keys [b, n, heads·w], normalised and rotated."""
        if about.norm is not None and not about.norm_after_rope:
            x = self._heads_normed(x, about, heads, place)
        if about.rope is not None:
            x = self._graph.add(
                "RotaryEmbedding", x, self._places(), *self._tables(about.rope), domain=CONTRIB,
                num_heads=heads, rotary_embedding_dim=about.rope.width, interleaved=int(about.rope.interleaved),
            )  # fmt: skip
        if about.norm is not None and about.norm_after_rope:
            x = self._heads_normed(x, about, heads, place)
        return x

    def _heads_normed(self, x: str, about: Attention, heads: int, place: str) -> str:
        graph, norm = self._graph, about.norm
        assert norm is not None
        if about.norm_over == "heads":
            return self._normalise(x, norm, place)
        apart = graph.add("Reshape", x, graph.shape(0, -1, heads, about.width))  # [b, n, heads, w]
        apart = self._normalise(apart, norm, place)
        return graph.add("Reshape", apart, graph.shape(0, -1, heads * about.width))

    def _tables(self, rope: Rope | None, half: bool = False) -> list[str]:
        """Cosines and sines of all positions [context, rotated / 2]."""
        assert rope is not None
        dtype = "float16" if half else "float32"
        return [
            self._graph.input(f"{what} {dtype} {rope_name(rope)}", self._context, rope.width // 2, dtype=dtype)
            for what in ("cos", "sin")
        ]

    def _places(self) -> str:
        """Each token's position [b, n]."""
        return self._graph.input("positions", "b", "n", dtype="int64")

    # ---- feed-forward -----------------------------------------------------------------------------------------------

    def _fed(self, x: str) -> str:
        """The feed-forward: x [b, n, H] to [b, n, H]."""
        graph, about = self._graph, self._block.mlp
        if about.experts is None:
            return self._one(x, about.wide, about.activation, "", about.gated)
        out, experts = self._routed(x, about.experts), about.experts
        if experts.shared:
            common = self._one(x, experts.shared, about.activation, "shared ", gated=True)
            if experts.shared_gated:
                opened = graph.add("Sigmoid", self._product("shared gating", x))  # [b, n, 1]
                common = graph.add("Mul", common, opened)
            out = graph.add("Add", out, common)
        return out

    def _one(self, x: str, wide: int, activation: Activation, which: str, gated: bool) -> str:
        graph = self._graph
        made = self._product(f"{which}up", x)  # [b, n, I], or gate and up [b, n, 2I]
        if gated:
            gate, up = graph.split(made, (wide, wide))
            made = graph.add("Mul", activate(graph, gate, activation), up)
        else:
            made = activate(graph, made, activation)
        return self._product(f"{which}down", made)

    def _routed(self, x: str, experts: Experts) -> str:
        """Send each token through the experts that the router chose for it."""
        graph, stacks = self._graph, self._weights.stacks
        assert stacks is not None
        rows = graph.add("Reshape", x, graph.shape(-1, self._hidden))  # [b·n, H]
        scores = self._product("router", rows)  # [b·n, experts]
        out = add_experts(graph, rows, scores, experts, stacks, self._hidden, self._tensors, self._bits)
        return graph.add("Reshape", out, graph.add("Shape", x))


def rope_name(rope: Rope) -> str:
    """The name under which graphs and shard know a rotation's tables; equal rotations have equal names."""
    scaling = ",".join(f"{key}={value}" for key, value in rope.scaling)
    return f"{rope.width}/{rope.theta}/{scaling}"


def normalise(graph: Graph, x: str, norm: Norm, weight: str, bias: str) -> str:
    """Normalise x over its last dimension."""
    if norm.kind == "rms":
        return graph.add("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=norm.eps, stash_type=1)
    inputs = (x, weight, bias) if bias else (x, weight)
    return graph.add("LayerNormalization", *inputs, axis=-1, epsilon=norm.eps)


def activate(graph: Graph, x: str, activation: Activation) -> str:
    """Apply an activation function to x."""
    match activation:
        case "silu":
            return graph.add("QuickGelu", x, domain=CONTRIB, alpha=1.0)
        case "quick_gelu":
            return graph.add("QuickGelu", x, domain=CONTRIB, alpha=1.702)
        case "gelu":
            return graph.add("Gelu", x, domain=CONTRIB)
        case "gelu_tanh":
            return graph.add("FastGelu", x, domain=CONTRIB)
        case "relu":
            return graph.add("Relu", x)
        case "relu2":
            positive = graph.add("Relu", x)
            return graph.add("Mul", positive, positive)
