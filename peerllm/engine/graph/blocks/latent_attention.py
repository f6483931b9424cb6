"""Attention over latents (DeepSeek V2, V3): a token leaves one vector, from which all heads' keys and values are made.

Queries are multiplied with the keys' half of the matrix instead of keys, so that latents themselves are keys and values
of one group that all heads share. In graphs both are the same memory.
"""

from __future__ import annotations

from peerllm.engine.graph.blocks.builder import Builder, rms
from peerllm.engine.graph.matrix_product import Part, Product
from peerllm.engine.graph.nodes import CONTRIB
from peerllm.engine.graph.rotation import magnitude
from peerllm.engine.graph.structure import LatentAttention, Rope
from peerllm.engine.graph.table.family import ConfigReader
from peerllm.engine.graph.table.names import Names
from peerllm.engine.graph.weights import Vectors
from peerllm.engine.weights.tensors import Floats


def read_latent_attention(values: ConfigReader, rope: Rope | None) -> LatentAttention:
    heads = values.whole("num_attention_heads")
    if rope is None or rope.width != values.whole("qk_rope_head_dim"):
        raise ValueError("a rotation of a part of the rotated part")
    plain, scaling = values.whole("qk_nope_head_dim"), dict(rope.scaling)
    scale = float(plain + rope.width) ** -0.5
    if scaling and (weight := scaling.get("mscale_all_dim")):
        scale *= magnitude(float(str(scaling["factor"])), float(str(weight))) ** 2
    rank = None if values.get("q_lora_rank") is None else values.whole("q_lora_rank")
    if rank is None and values.get("attention_bias"):
        raise ValueError("biases of latents but not of queries")
    width = values.whole("v_head_dim", values.whole("hidden_size") // heads)
    apart = bool(values.get("peerllm_kv_apart"))
    return LatentAttention(heads, values.whole("kv_lora_rank"), plain, width, scale, rope, rank, apart=apart)


def latent_attention_weights(names: Names, about: LatentAttention, hidden: int) -> tuple[dict[str, Product], Vectors]:
    queries, latents = about.heads * about.query_width, Part(names["latents"], about.kept)
    vectors = {"latent norm": (names["latent norm"], (about.latent,))}
    products = {"out": Product((Part(names["o"], hidden),), about.heads * about.value_width)}
    # The others are multiplied head by head, for which there is no rounded product.
    if about.apart:
        products |= {
            "keys": Product((Part(names["kv keys"], about.heads * about.latent),), about.plain, exact=True),
            "values": Product((Part(names["kv values"], about.heads * about.value_width),), about.latent, exact=True),
        }
    else:
        rows = about.heads * (about.plain + about.value_width)
        products["kv"] = Product((Part(names["kv"], rows),), about.latent, exact=True)
    if about.query_latent is None:
        products["latents"] = Product((Part(names["q"], queries), latents), hidden)
    else:
        products["latents"] = Product((Part(names["query latents"], about.query_latent), latents), hidden)
        products["queries"] = Product((Part(names["q up"], queries),), about.query_latent)
        vectors["query norm"] = (names["query norm"], (about.query_latent,))
    return products, vectors


def add_latent_attention(builder: Builder, x: str, about: LatentAttention) -> str:
    """x [b, n, H] to [b, n, heads · value_width]; latents are appended to the slots in place."""
    graph, heads, latent, rotated = builder.graph, about.heads, about.latent, about.rope.width
    lead = graph.add("Shape", x, start=0, end=2)
    first = about.query_latent or heads * about.query_width
    queries, key, turned = graph.split(builder.product("latents", x), (first, latent, rotated))
    if about.query_latent is not None:
        queries = rms(graph, queries, graph.weight(builder.vector("query norm")), about.eps)
        queries = builder.product("queries", queries)  # [b, n, heads · query_width]
    keys, values = _matrices(builder, about)
    apart = graph.add("Reshape", queries, graph.shape(0, -1, heads, about.query_width))
    plain, query_turned = graph.split(apart, (about.plain, rotated))
    plain = _by_head(builder, plain, keys, lead)  # [b, n, heads, latent]
    query_turned = graph.add("Reshape", query_turned, graph.shape(0, -1, heads * rotated))
    query_turned = builder.rotated(query_turned, about.rope, heads)
    query_turned = graph.add("Reshape", query_turned, graph.shape(0, -1, heads, rotated))
    key = rms(graph, key, graph.weight(builder.vector("latent norm")), about.eps)
    query = _joined(builder, plain, query_turned, about, 4)
    query = graph.add("Reshape", query, graph.shape(0, -1, heads * about.width))
    key = _joined(builder, key, builder.rotated(turned, about.rope, 1), about, 3)
    out = _attended(builder, query, key, about)
    out = graph.add("Reshape", out, graph.shape(0, -1, heads, about.width))
    out = graph.split(out, (latent, about.width - latent))[0]
    out = _by_head(builder, out, values, lead)
    return graph.add("Reshape", out, graph.shape(0, -1, heads * about.value_width))


def _matrices(builder: Builder, about: LatentAttention) -> tuple[Floats, Floats]:
    """What makes keys and values of latents, for each head [heads, plain, latent] and [heads, latent, value_width]."""
    heads, latent = about.heads, about.latent
    if about.apart:
        keys = builder.matrix("keys").reshape(heads, latent, about.plain).swapaxes(1, 2)
        return keys, builder.matrix("values").reshape(heads, about.value_width, latent).swapaxes(1, 2)
    both = builder.matrix("kv").reshape(heads, about.plain + about.value_width, latent)
    return both[:, : about.plain], both[:, about.plain :].swapaxes(1, 2)


def _attended(builder: Builder, query: str, key: str, about: LatentAttention) -> str:
    """Queries [b, n, heads · width] over the latents so far, to which key [b, n, width] is appended."""
    graph = builder.graph
    if builder.half:
        query, key = (graph.add("Cast", part, to=10) for part in (query, key))
    old, new = builder.state("latent")
    _, again = builder.state("latent", "again")  # as values
    out = f"attended {builder.number}"
    graph.node(
        "GroupQueryAttention", [query, key, key, old, old, *builder.held()], [out, new, again], CONTRIB,
        num_heads=about.heads, kv_num_heads=1, scale=about.scale,
    )  # fmt: skip
    return graph.add("Cast", out, to=1) if builder.half else out


def _joined(builder: Builder, plain: str, rotated: str, about: LatentAttention, rank: int) -> str:
    """Both parts of queries or keys beside each other, with zeros up to `width`; `rank`: their dimensions."""
    graph = builder.graph
    whole = graph.add("Concat", plain, rotated, axis=-1)
    if about.width == about.kept:
        return whole
    return graph.add("Pad", whole, graph.shape(*[0] * (2 * rank - 1), about.width - about.kept))


def _by_head(builder: Builder, x: str, matrices: Floats, lead: str) -> str:
    """x [b, n, heads, c], each head multiplied with its own matrix of [heads, c, r]: [b, n, heads, r]."""
    graph, (heads, columns, rows) = builder.graph, matrices.shape
    x = graph.add("Transpose", graph.add("Reshape", x, graph.shape(-1, heads, columns)), perm=[1, 0, 2])
    x = graph.add("MatMul", x, graph.weight(matrices))  # [heads, b·n, r]
    x = graph.add("Transpose", x, perm=[1, 0, 2])
    return graph.add("Reshape", x, graph.add("Concat", lead, graph.shape(heads, rows), axis=0))
