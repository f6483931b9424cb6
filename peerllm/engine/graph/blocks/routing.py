"""Which experts each token uses, where that is not by softmax alone."""

from __future__ import annotations

from peerllm.engine.graph.blocks.builder import Builder
from peerllm.engine.graph.structure import Experts, Routing

NEVER = -1e30  # a score whose exponential is zero


def add_routing(builder: Builder, scores: str, experts: Experts, about: Routing) -> tuple[str, str]:
    """From scores [n, experts]: scores by whose softmax the operator chooses and weights as `about` says, and factors.

    The operator weights the experts that it uses by a softmax over them: over logarithms of their weights that is
    the weights over their sum, by which [n, 1] its output must be multiplied.
    """
    graph = builder.graph
    made = graph.add("Sigmoid", scores) if about.scores == "sigmoid" else graph.add("Softmax", scores, axis=-1)
    choice = graph.add("Add", made, graph.weight(builder.vector("choice"))) if about.biased else made
    if about.groups_used < about.groups:
        choice = _within_groups(builder, choice, experts, about)
    chosen = _best(builder, choice, experts.used)[1]  # [n, used]
    weights = graph.add("GatherElements", made, chosen, axis=1)
    total = graph.add("ReduceSum", weights, graph.shape(1), keepdims=1)  # [n, 1]
    nothing = graph.add("Expand", graph.number(NEVER), graph.add("Shape", scores))
    logits = graph.add("ScatterElements", nothing, chosen, graph.add("Log", weights), axis=1)
    if experts.normalised:
        total = graph.add("Div", total, graph.add("Add", total, graph.number(about.eps)))
    return logits, graph.add("Mul", total, graph.number(about.scale))


def _within_groups(builder: Builder, choice: str, experts: Experts, about: Routing) -> str:
    """Scores [n, experts] of the best groups; those of the others can never be chosen."""
    graph, each = builder.graph, experts.count // about.groups
    apart = graph.add("Reshape", choice, graph.shape(-1, about.groups, each))
    judged = graph.add("ReduceSum", _best(builder, apart, about.best)[0], graph.shape(2), keepdims=0)  # [n, groups]
    used = _best(builder, judged, about.groups_used)[1]
    nothing = graph.add("Expand", graph.number(NEVER), graph.add("Shape", judged))
    allowed = graph.add("GatherElements", graph.add("Sub", judged, judged), used, axis=1)  # zeros
    barred = graph.add("ScatterElements", nothing, used, allowed, axis=1)
    barred = graph.add("Unsqueeze", barred, graph.shape(2))  # [n, groups, 1]
    return graph.add("Reshape", graph.add("Add", apart, barred), graph.shape(-1, experts.count))


def _best(builder: Builder, x: str, count: int) -> tuple[str, str]:
    """The `count` largest numbers along the last dimension, and where they are."""
    graph = builder.graph
    names = graph.fresh("largest"), graph.fresh("where")
    graph.node("TopK", [x, graph.shape(count)], names, axis=-1)
    return names
