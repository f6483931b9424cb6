"""LFM2's short convolution, gated before and after."""

from __future__ import annotations

from peerllm.engine.graph.blocks.builder import Builder
from peerllm.engine.graph.matrix_product import Part, Product
from peerllm.engine.graph.nodes import CONTRIB
from peerllm.engine.graph.structure import ShortConvolution
from peerllm.engine.graph.table.family import ConfigReader
from peerllm.engine.graph.table.names import Names
from peerllm.engine.graph.weights import Vectors


def read_convolution(values: ConfigReader, hidden: int) -> ShortConvolution:
    return ShortConvolution(hidden, values.whole("conv_L_cache"))


def convolution_weights(names: Names, about: ShortConvolution, hidden: int) -> tuple[dict[str, Product], Vectors]:
    width = about.channels
    products = {
        "mixed": Product((Part(names["mixed"], 3 * width),), hidden),
        "out": Product((Part(names["mixer out"], hidden),), width),
    }
    return products, {"taps": (names["taps"], (width, 1, about.taps))}


def add_convolution(builder: Builder, x: str, about: ShortConvolution) -> str:
    """x [b, n, H] to [b, n, channels]; the slots keep the last tokens' b · x."""
    graph, width = builder.graph, about.channels
    before, after, x = graph.split(builder.product("mixed", x), (width, width, width))  # [b, n, channels] each
    seen = add_taps(builder, graph.add("Mul", before, x))
    return graph.add("Mul", after, seen)


def add_taps(builder: Builder, x: str, activation: str = "none") -> str:
    """x [b, n, channels] convolved over the tokens: each channel's weighted sum of the last few."""
    graph = builder.graph
    old, new = builder.state("convolution")
    weight, out = graph.weight(builder.vector("taps")), f"convolved {builder.number}"
    graph.node(
        "CausalConvWithState", [x, weight, builder.bias("taps"), old], [out, new], CONTRIB,
        channels_last=1, activation=activation,
    )  # fmt: skip
    return out
