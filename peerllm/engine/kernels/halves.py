"""A block as two graphs: what comes before its attention, and what comes after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from peerllm.engine.kernels.anatomy import Anatomy, Norm
from peerllm.engine.kernels.graphs import BATCH, CONTRIB, TOKENS, Graph

Product = Callable[[Graph, str, str], str]  # (graph, input, role of the matrix): adds it, without bias; its output
HEADS = ("queries", "keys", "values")  # what the first half makes


def first(anatomy: Anatomy, product: Product) -> Graph:
    """x [1, n, hidden] to queries, keys and values [1, n, heads * width], turned by what cos and sin say."""
    graph = Graph()
    x = graph.given("x", BATCH, TOKENS, anatomy.hidden)
    if anatomy.rotary:
        places = graph.given("places", BATCH, TOKENS, number=np.int64)
        angles = [graph.given(name, TOKENS, anatomy.rotary // 2) for name in ("cos", "sin")]
    normed = _normed(graph, anatomy, x, "before attention")
    sizes = widths(anatomy)
    if "heads" in anatomy.before:
        made = graph.split(_multiplied(graph, anatomy, product, normed, "heads"), dict(zip(HEADS, sizes, strict=True)))
    else:
        made = {role: _multiplied(graph, anatomy, product, normed, role) for role in HEADS}
    for role, size in zip(HEADS, sizes, strict=True):
        heads = anatomy.heads if role == "queries" else anatomy.groups
        out = made[role]
        if role in anatomy.norms:
            out = _heads_normed(graph, anatomy, out, role, heads)
        if anatomy.rotary and role != "values":
            about = {"num_heads": heads, "rotary_embedding_dim": anatomy.rotary, "interleaved": int(anatomy.paired)}
            graph.add("RotaryEmbedding", [out, places, *angles], role, CONTRIB, **about)
        else:
            graph.add("Identity", [out], role)
        graph.wanted(role, BATCH, TOKENS, size)
    return graph


def second(anatomy: Anatomy, product: Product, dtype: torch.dtype) -> Graph:
    """attended [1, n, heads * value width] and x [1, n, hidden] to y [1, n, hidden], rounded to `dtype`.

    So what a block gives is the same whether the next one is here or on another device.
    """
    graph = Graph()
    attended = graph.given("attended", BATCH, TOKENS, anatomy.heads * anatomy.value_width)
    x = graph.given("x", BATCH, TOKENS, anatomy.hidden)
    out = _multiplied(graph, anatomy, product, attended, "out")
    middle = _added(graph, anatomy, x, _normed(graph, anatomy, out, "after attention"), "middle")
    normed = _normed(graph, anatomy, middle, "before mlp")
    if "gate and up" in anatomy.after:
        both = _multiplied(graph, anatomy, product, normed, "gate and up")
        made = graph.split(both, {"gate": anatomy.wide, "up": anatomy.wide})
    else:
        made = {role: _multiplied(graph, anatomy, product, normed, role) for role in ("gate", "up")}
    gated = graph.add("Mul", [_activated(graph, anatomy.activation, made["gate"]), made["up"]], "gated")
    down = _multiplied(graph, anatomy, product, gated, "down")
    out = _added(graph, anatomy, middle, _normed(graph, anatomy, down, "after mlp"), "sum")
    graph.rounded(out, dtype, "y")
    graph.wanted("y", BATCH, TOKENS, anatomy.hidden)
    return graph


def widths(anatomy: Anatomy) -> tuple[int, int, int]:
    """Numbers of a token's queries, keys and values."""
    keys, values = anatomy.groups * anatomy.width, anatomy.groups * anatomy.value_width
    return anatomy.heads * anatomy.width, keys, values


def bias_name(role: str) -> str:
    return f"{role} bias"


def norm_name(place: str) -> str:
    return f"{place} norm"


def _multiplied(graph: Graph, anatomy: Anatomy, product: Product, given: str, role: str) -> str:
    out = product(graph, given, role)
    if role not in anatomy.biases:
        return out
    return graph.add("Add", [out, graph.given(bias_name(role), "rows of " + role)], f"{role} with bias")


def _added(graph: Graph, anatomy: Anatomy, x: str, more: str, output: str) -> str:
    if anatomy.residual != 1:
        factor = graph.constant(f"{output} factor", float(anatomy.residual))
        more = graph.add("Mul", [more, factor], f"{output} scaled")
    return graph.add("Add", [x, more], output)


def _normed(graph: Graph, anatomy: Anatomy, given: str, place: str) -> str:
    norm = anatomy.norms.get(place)
    return given if norm is None else _norm(graph, norm, given, place)


def _norm(graph: Graph, norm: Norm, given: str, place: str) -> str:
    weight = graph.given(norm_name(place), norm.width)
    about: dict[str, Any] = {"axis": -1, "epsilon": norm.eps, "stash_type": 1}
    return graph.add("SimplifiedLayerNormalization", [given, weight], f"{place} normed", **about)


def _heads_normed(graph: Graph, anatomy: Anatomy, given: str, role: str, heads: int) -> str:
    """All of a token's heads as one, or each."""
    norm = anatomy.norms[role]
    if norm.width == heads * anatomy.width:
        return _norm(graph, norm, given, role)
    each = graph.constant(f"{role} each", [0, 0, heads, anatomy.width])
    joined = graph.constant(f"{role} joined", [0, 0, heads * anatomy.width])
    normed = _norm(graph, norm, graph.add("Reshape", [given, each], f"{role} by head"), role)
    return graph.add("Reshape", [normed, joined], f"{role} together")


def _activated(graph: Graph, activation: str, given: str) -> str:
    if activation == "silu":
        return graph.add("QuickGelu", [given], "activated", CONTRIB, alpha=1.0)  # x times sigmoid(x)
    if activation == "relu":
        return graph.add("Relu", [given], "activated")
    return graph.add({"gelu": "Gelu", "tanh gelu": "FastGelu"}[activation], [given], "activated", CONTRIB)
