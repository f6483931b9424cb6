"""Linear attention with the gated delta rule, as Qwen3-Next and Qwen3.5 have it."""

from __future__ import annotations

import numpy as np

from peerllm.engine.graph.blocks.builder import Builder, ones, rms
from peerllm.engine.graph.blocks.short_convolution import add_taps
from peerllm.engine.graph.matrix_product import Part, Product
from peerllm.engine.graph.nodes import CONTRIB
from peerllm.engine.graph.structure import DeltaRule
from peerllm.engine.graph.table.family import ConfigReader
from peerllm.engine.graph.table.names import Names
from peerllm.engine.graph.weights import Vectors
from peerllm.engine.weights.tensors import Floats

UNIT_EPS = 1e-6  # added to the squared length of queries and keys


def read_delta_rule(values: ConfigReader) -> DeltaRule:
    return DeltaRule(
        values.whole("linear_num_key_heads"), values.whole("linear_num_value_heads"),
        values.whole("linear_key_head_dim"), values.whole("linear_value_head_dim"),
        values.whole("linear_conv_kernel_dim"), values.number("norm_eps", 1e-6),
        bool(values.get("value_heads_tiled")), bool(values.get("decays_stored")),
    )  # fmt: skip


def delta_rule_weights(names: Names, about: DeltaRule, hidden: int) -> tuple[dict[str, Product], Vectors]:
    heads, width = about.heads, about.value_width
    if "qkvz" in names:
        mixed = Part(names["qkvz"], about.channels + about.values, _rows(about, about.key_width, width))
        mixed_parts: tuple[Part, ...] = (mixed,)
        gates: tuple[Part, ...] = (Part(names["ba"], 2 * heads, _rows(about, 0, 1)),)
    else:
        mixed_parts = (Part(names["mixed"], about.channels), Part(names["z"], about.values))
        gates = (Part(names["beta"], heads), Part(names["decay"], heads))
    products = {
        "mixed": Product(mixed_parts, hidden),
        "gates": Product(gates, hidden, exact=True),  # small, and the decay is an exponent
        "out": Product((Part(names["mixer out"], hidden),), about.values),
    }
    return products, {
        "taps": (names["taps"], (about.channels, 1, about.taps)),
        "A": (names["A"], (heads,)),
        "dt": (names["dt"], (heads,)),
        "mixer norm": (names["mixer norm"], (width,)),
    }


def add_delta_rule(builder: Builder, x: str, about: DeltaRule) -> str:
    """x [b, n, H] to [b, n, values]; the slots keep a state [key_width, value_width] of each value head."""
    graph, heads, keys = builder.graph, about.heads, about.keys
    mixed, gate = graph.split(builder.product("mixed", x), (about.channels, about.values))
    mixed = add_taps(builder, mixed, "silu")
    queries, key, value = graph.split(mixed, (keys, keys, about.values))
    queries, key = (_unit(builder, part, about) for part in (queries, key))
    serving = about.key_heads
    if about.tiled:  # the operator gives each key head consecutive value heads
        serving, copies = heads, heads // about.key_heads
        queries, key = (graph.add("Concat", *[part] * copies, axis=-1) for part in (queries, key))
    update, decay = graph.split(builder.product("gates", x), (heads, heads))  # [b, n, heads] each
    scale = graph.weight(decays(builder.vector("A"), about.decays_stored))
    names = [f"decay {builder.number}", f"update {builder.number}"]
    graph.node("LinearAttentionGate", [decay, graph.weight(builder.vector("dt")), scale, update], names, CONTRIB)
    old, new = builder.state("recurrent")
    out = f"recalled {builder.number}"
    graph.node(
        "LinearAttention", [queries, key, value, old, *names], [out, new], CONTRIB,
        update_rule="gated_delta", q_num_heads=serving, kv_num_heads=heads,
    )  # fmt: skip
    weight = graph.weight(builder.vector("mixer norm"))
    return graph.add("GatedRMSNorm", out, weight, gate, domain=CONTRIB, activation="silu", epsilon=about.eps)


def decays(stored: Floats, ready: bool) -> Floats:
    """By how much a head's state decays in a step of length one: -exp(A_log), which some files hold ready."""
    return stored if ready else -np.exp(stored)


def _unit(builder: Builder, x: str, about: DeltaRule) -> str:
    """Queries or keys, each head of length one: x / sqrt(sum(x²) + eps) is a mean's norm by other numbers."""
    graph, width = builder.graph, about.key_width
    apart = graph.add("Reshape", x, graph.shape(0, -1, about.key_heads, width))
    apart = rms(graph, apart, ones(graph, width, width**-0.5), UNIT_EPS / width)
    return graph.add("Reshape", apart, graph.shape(0, -1, about.keys))


def _rows(about: DeltaRule, key: int, value: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows of a matrix that holds, for each key head, its query, key, values and gates; in the order q, k, v, z."""
    each = about.heads // about.key_heads * value
    sizes = [key, key, each, each]
    rows = np.arange(about.key_heads * sum(sizes), dtype=np.int64).reshape(about.key_heads, -1)
    return np.concatenate([part.reshape(-1) for part in np.split(rows, np.cumsum(sizes)[:-1], axis=1)])
