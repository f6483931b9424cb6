"""A decoder block as operators, top to bottom, for b sequences of n tokens each; either b or n is 1.

Trailing comments give shapes: H hidden, I feed-forward width.
"""

from __future__ import annotations

from peerllm.engine.graph.blocks.attention import add_attention
from peerllm.engine.graph.blocks.builder import Builder
from peerllm.engine.graph.blocks.delta_rule import add_delta_rule
from peerllm.engine.graph.blocks.latent_attention import add_latent_attention
from peerllm.engine.graph.blocks.routing import add_routing
from peerllm.engine.graph.blocks.short_convolution import add_convolution
from peerllm.engine.graph.blocks.state_space import add_state_space
from peerllm.engine.graph.experts import add_experts
from peerllm.engine.graph.nodes import CONTRIB, Graph
from peerllm.engine.graph.structure import (
    Activation,
    Attention,
    DeltaRule,
    Experts,
    LatentAttention,
    ShortConvolution,
    StateSpace,
)


def add_block(builder: Builder, x: str, own: str = "") -> str:
    """Apply the builder's block to x [b, n, H]; `own`: the input that it alone reads."""
    graph, block = builder.graph, builder.weights.block
    x = _applied(builder, x)
    if block.own_input:
        gate = activate(graph, builder.product("own gate", x), block.mlp.activation)
        made = builder.product("own out", graph.add("Mul", gate, own))
        x = graph.add("Add", x, builder.normed(made, "after own input"))
    return graph.add("Mul", x, graph.weight(builder.vector("scalar"))) if block.scaled else x


def _applied(builder: Builder, x: str) -> str:
    """Attention and feed-forward."""
    graph, block = builder.graph, builder.weights.block

    def plus(x: str, delta: str) -> str:
        return graph.add("Add", x, delta if block.residual == 1.0 else _scaled(graph, delta, block.residual))

    entering = builder.normed(x, "before attention")  # [b, n, H]
    taken = builder.product("out", _mixed(builder, entering))
    taken = builder.normed(taken, "after attention")
    if block.parallel:
        reading = builder.normed(x, "before mlp") if block.norm("before mlp") else entering
        return plus(x, graph.add("Add", taken, builder.normed(_fed(builder, reading), "after mlp")))
    middle = plus(x, taken)  # [b, n, H]
    return plus(middle, builder.normed(_fed(builder, builder.normed(middle, "before mlp")), "after mlp"))


def _scaled(graph: Graph, x: str, factor: float) -> str:
    return graph.add("Mul", x, graph.number(factor))


def _mixed(builder: Builder, x: str) -> str:
    """What the block's mixer makes of x [b, n, H] and the tokens before it, to be multiplied with the matrix "out"."""
    match builder.weights.block.mixer:
        case Attention() as about:
            return add_attention(builder, x, about)
        case LatentAttention() as about:
            return add_latent_attention(builder, x, about)
        case ShortConvolution() as about:
            return add_convolution(builder, x, about)
        case DeltaRule() as about:
            return add_delta_rule(builder, x, about)
        case StateSpace() as about:
            return add_state_space(builder, x, about)


# ---- feed-forward ---------------------------------------------------------------------------------------------------


def _fed(builder: Builder, x: str) -> str:
    """The feed-forward: x [b, n, H] to [b, n, H]."""
    graph, about = builder.graph, builder.weights.block.mlp
    if about.experts is None:
        return _one(builder, x, about.wide, about.activation, "", about.gated)
    out, experts = _routed(builder, x, about.experts), about.experts
    if experts.shared:
        common = _one(builder, x, experts.shared, about.activation, "shared ", gated=True)
        if experts.shared_gated:
            opened = graph.add("Sigmoid", builder.product("shared gating", x))  # [b, n, 1]
            common = graph.add("Mul", common, opened)
        out = graph.add("Add", out, common)
    return out


def _one(builder: Builder, x: str, wide: int, activation: Activation, which: str, gated: bool) -> str:
    graph = builder.graph
    made = builder.product(f"{which}up", x)  # [b, n, I], or gate and up [b, n, 2I]
    if gated:
        gate, up = graph.split(made, (wide, wide))
        made = graph.add("Mul", activate(graph, gate, activation), up)
    else:
        made = activate(graph, made, activation)
    return builder.product(f"{which}down", made)


def _routed(builder: Builder, x: str, experts: Experts) -> str:
    """Send each token through the experts that the router chose for it."""
    graph, weights = builder.graph, builder.weights
    assert weights.stacks is not None
    rows = graph.add("Reshape", x, graph.shape(-1, weights.hidden))  # [b·n, H]
    scores, factors = builder.product("router", rows), ""  # [b·n, experts]
    if experts.routing is not None:
        scores, factors = add_routing(builder, scores, experts, experts.routing)
    out = add_experts(graph, rows, scores, experts, weights.stacks, weights.hidden, builder.tensors, builder.bits)
    if factors:
        out = graph.add("Mul", out, factors)
    return graph.add("Reshape", out, graph.add("Shape", x))


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
