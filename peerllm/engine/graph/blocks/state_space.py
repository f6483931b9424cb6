"""Mamba-2's state space, which is linear attention with decay: queries C, keys B and values dt · x."""

from __future__ import annotations

import numpy as np

from peerllm.engine.graph.blocks.builder import Builder, ones, rms
from peerllm.engine.graph.blocks.delta_rule import decays
from peerllm.engine.graph.blocks.short_convolution import add_taps
from peerllm.engine.graph.matrix_product import Part, Product
from peerllm.engine.graph.nodes import CONTRIB
from peerllm.engine.graph.structure import StateSpace
from peerllm.engine.graph.table.family import ConfigReader
from peerllm.engine.graph.table.names import Names
from peerllm.engine.graph.weights import Vectors


def read_state_space(values: ConfigReader) -> StateSpace:
    heads, width = values.whole("mamba_n_heads"), values.get("mamba_d_head")
    if width == "auto":
        width = values.whole("mamba_expand") * values.whole("hidden_size") // heads
    return StateSpace(
        heads, values.whole("mamba_n_groups"), width, values.whole("mamba_d_state"), values.whole("mamba_d_conv"),
        values.number("norm_eps", 1e-6), bool(values.get("decays_stored")),
    )  # fmt: skip


def state_space_weights(names: Names, about: StateSpace, hidden: int) -> tuple[dict[str, Product], Vectors]:
    first = about.values + about.channels
    rows = np.arange(first + about.heads, dtype=np.int64)
    mixed, steps = (Part(names["mixed"], len(some), some, whole=len(rows)) for some in (rows[:first], rows[first:]))
    products = {
        "mixed": Product((mixed,), hidden),
        "steps": Product((steps,), hidden, exact=True),  # they become exponents
        "out": Product((Part(names["mixer out"], hidden),), about.values),
    }
    return products, {
        "taps": (names["taps"], (about.channels, 1, about.taps)),
        "mixer norm": (names["mixer norm"], (about.values,)),
        **{role: (names[role], (about.heads,)) for role in ("A", "D", "dt")},
    }


def add_state_space(builder: Builder, x: str, about: StateSpace) -> str:
    """x [b, n, H] to [b, n, values]; the slots keep a state [kept, width] of each head."""
    graph, heads = builder.graph, about.heads
    gate, mixed = graph.split(builder.product("mixed", x), (about.values, about.channels))
    mixed = add_taps(builder, mixed, "silu")
    entering, key, query = graph.split(mixed, (about.values, about.keys, about.keys))
    step = graph.add("Add", builder.product("steps", x), graph.weight(builder.vector("dt")))
    step = graph.add("Softplus", step)  # [b, n, heads]
    decay = graph.add("Mul", step, graph.weight(decays(builder.vector("A"), about.decays_stored)))
    value = graph.add("Reshape", entering, graph.shape(0, -1, heads, about.width))
    value = graph.add("Mul", value, graph.add("Unsqueeze", step, graph.shape(3)))
    value = graph.add("Reshape", value, graph.shape(0, -1, about.values))
    old, new = builder.state("recurrent")
    out = f"recalled {builder.number}"
    graph.node(
        "LinearAttention", [query, key, value, old, decay], [out, new], CONTRIB,
        update_rule="gated", q_num_heads=about.groups, kv_num_heads=heads, scale=1.0,
    )  # fmt: skip
    passed = graph.weight(np.repeat(builder.vector("D"), about.width))
    out = graph.add("Add", out, graph.add("Mul", entering, passed))
    out = graph.add("Mul", out, graph.add("QuickGelu", gate, domain=CONTRIB, alpha=1.0))
    each = about.values // about.groups
    out = graph.add("Reshape", out, graph.shape(0, -1, about.groups, each))
    out = graph.add("Reshape", rms(graph, out, ones(graph, each), about.eps), graph.shape(0, -1, about.values))
    return graph.add("Mul", out, graph.weight(builder.vector("mixer norm")))
