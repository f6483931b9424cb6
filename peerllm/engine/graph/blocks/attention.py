"""Causal attention as operators, for b sequences of n tokens each; either b or n is 1.

Trailing comments give shapes: H hidden, h heads, g groups of keys and values, w head width.
"""

from __future__ import annotations

import numpy as np

from peerllm.engine.graph.blocks.builder import Builder
from peerllm.engine.graph.matrix_product import require
from peerllm.engine.graph.nodes import CONTRIB
from peerllm.engine.graph.structure import Attention

INSIDE = 16  # if a head's width and its rotated part are multiples of this, the attention operator rotates it


def add_attention(builder: Builder, x: str, about: Attention) -> str:
    """Attention: x [b, n, H] to [b, n, h·w]; keys and values are appended to the slots in place."""
    graph, width = builder.graph, about.width
    made, gate = builder.product("qkv", x), ""  # [b, n, (h + 2g)·w], or with gates [b, n, (2h + 2g)·w]
    if about.gated:
        made, gate = graph.split(made, ((about.heads + 2 * about.groups) * width, about.heads * width))
    if about.clip is not None:
        made = graph.add("Clip", made, graph.number(-about.clip), graph.number(about.clip))
    inside = about.rope is not None and about.norm is None and width % INSIDE == 0 == about.rope.width % INSIDE
    given = [made, "", ""]
    if about.maker is not None:
        given = [_turned(builder, made, about, about.heads, "queries")]
    elif about.norm is not None or (about.rope is not None and not inside):
        sizes = (about.heads * width, about.groups * width, about.groups * width)
        queries, keys, *rest = graph.split(made, sizes[: 2 if about.keys_as_values else 3])
        turned = [
            _turned(builder, part, about, heads, place)
            for part, heads, place in ((queries, about.heads, "queries"), (keys, about.groups, "keys"))
        ]
        values = rest[0] if rest else keys
        if about.value_norm is not None:
            values = builder.heads_normed(values, about.value_norm, "", about.groups, width)
        given = [*turned, values]
    if builder.half:
        given = [graph.add("Cast", part, to=10) if part else "" for part in given]
    if about.maker is None:
        states = [builder.state(name) for name in ("keys", "values")]
        for name, part in zip(("keys", "values"), given[1:], strict=True):
            graph.made[f"{name} {builder.number}"] = part
    else:
        states = [builder.state(name, f"again{builder.number}") for name in ("keys", "values")]
        given += [_made(builder, name, about) for name in ("keys", "values")]
    rotation, rotary = ["", "", ""], {}
    if inside and about.rope is not None:
        rotation = [*builder.tables(about.rope, half=builder.half), builder.places()]
        rotary = {"do_rotary": 1, "rotary_interleaved": int(about.rope.interleaved)}
    sinks = _sinks(builder, about) if about.sinks else ""
    inputs = [*given, *(old for old, _ in states), *builder.held(), *rotation, "", sinks]
    outputs = [f"attended {builder.number}", *(new for _, new in states)]
    graph.node(
        "GroupQueryAttention", inputs, outputs, CONTRIB, num_heads=about.heads, kv_num_heads=about.groups,
        scale=about.scale, softcap=about.softcap, local_window_size=about.window or -1, **rotary,
    )  # fmt: skip
    out = graph.add("Cast", outputs[0], to=1) if builder.half else outputs[0]
    return graph.add("Mul", out, graph.add("Sigmoid", gate)) if gate else out


def _made(builder: Builder, name: str, about: Attention) -> str:
    """The keys or values [b, n, g·w] that the maker has just written into its room [b, g, room, w].

    The attention operator takes new keys and values whatever its room holds: it writes the same ones there again.
    """
    graph, full = builder.graph, f"{name} {about.maker}"
    if full not in graph.made:  # an earlier graph has written them
        places = builder.places()  # [b, n]
        last = graph.add("Slice", places, graph.shape(-1), graph.shape(2**31), graph.shape(1))  # [b, 1]
        ends = graph.add("Cast", graph.add("Unsqueeze", builder.held()[0], graph.shape(1)), to=7)
        rows = graph.add("Add", graph.add("Sub", places, last), ends)  # [b, n]
        rows = graph.add("Unsqueeze", rows, graph.shape(1, 3))  # [b, 1, n, 1]
        rows = graph.add("Tile", rows, graph.shape(1, about.groups, 1, 1))
        found = graph.add("GatherND", full, rows, batch_dims=2)  # [b, g, n, w]
        found = graph.add("Transpose", found, perm=[0, 2, 1, 3])
        graph.made[full] = graph.add("Reshape", found, graph.shape(0, 0, about.groups * about.width))
    return graph.made[full]


def _sinks(builder: Builder, about: Attention) -> str:
    """Attention sinks [h]: scores that take part in the softmax and contribute no value."""
    name = builder.weights.names["sinks"]
    require(builder.tensors, name, (about.heads,))
    made = builder.tensors.floats(name, slice(None))
    return builder.graph.weight(made.astype(np.float16) if builder.half else made)


def _turned(builder: Builder, x: str, about: Attention, heads: int, place: str) -> str:
    """Queries or keys [b, n, heads·w], normalised and rotated."""
    if about.norm is not None and not about.norm_after_rope:
        x = _heads_normed(builder, x, about, heads, place)
    if about.rope is not None:
        x = builder.rotated(x, about.rope, heads)
    if about.norm is not None and about.norm_after_rope:
        x = _heads_normed(builder, x, about, heads, place)
    return x


def _heads_normed(builder: Builder, x: str, about: Attention, heads: int, place: str) -> str:
    norm = about.norm
    assert norm is not None
    if about.norm_over == "heads":
        return builder.normalise(x, norm, place)
    return builder.heads_normed(x, norm, place, heads, about.width)
