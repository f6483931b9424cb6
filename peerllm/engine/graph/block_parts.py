"""Which tensors of its family's files a block is made of, as products and stacks of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt

from peerllm.engine.graph.blocks.delta_rule import delta_rule_weights
from peerllm.engine.graph.blocks.latent_attention import latent_attention_weights
from peerllm.engine.graph.blocks.short_convolution import convolution_weights
from peerllm.engine.graph.blocks.state_space import state_space_weights
from peerllm.engine.graph.experts import Stacks
from peerllm.engine.graph.matrix_product import Part, Product
from peerllm.engine.graph.structure import (
    Attention,
    Block,
    DeltaRule,
    LatentAttention,
    Mixer,
    ShortConvolution,
    StateSpace,
)
from peerllm.engine.graph.table.family import Family
from peerllm.engine.graph.weights import BlockWeights, Names, Vectors
from peerllm.engine.weights.formats import FormOf

ROLES = ("gate", "up", "gate up", "down")


@dataclass(frozen=True, slots=True)
class Stored:
    """What config.json's quantization_config says about matrices and norms."""

    form_of: FormOf
    kept: bool = False  # products compute with the file's numbers
    paired: bool = False  # rows of queries and keys that are rotated together are neighbours
    offset: bool = False  # norms' weights have their offset added
    stacked: bool = False  # experts are stacks of gate, up and down, whatever the family
    recurrent: Mapping[str, bool] = field(default_factory=dict)  # see structure.DeltaRule

    def formed(self, part: Part) -> Part:
        """The part, and how its tensor is stored."""
        return replace(part, form=self.form_of(part.name), kept=self.kept)


def block_weights(family: Family, block: Block, number: int, hidden: int, stored: Stored) -> BlockWeights:
    prefix = f"{family.layers}.{number}."
    names = {role: prefix + name for role, name in family.names.items()}
    mlp, turned, stacks = block.mlp, family.turned, None
    products, vectors = _mixer_weights(family, names, block.mixer, hidden, stored.paired)
    if block.own_input:
        products["own gate"] = Product((Part(names["own gate"], block.own_input),), hidden)
        products["own out"] = Product((Part(names["own out"], hidden),), block.own_input)
    if block.scaled:
        vectors = {**vectors, "scalar": (names["scalar"], (1,))}
    if mlp.experts is None:
        products |= _dense(names, mlp.wide, hidden, mlp.gated, turned)
    else:
        experts = mlp.experts
        if experts.routing is not None and experts.routing.biased:
            vectors = {**vectors, "choice": (names["choice"], (experts.count,))}
        products["router"] = Product((Part(names["router"], experts.count),), hidden, exact=True)
        stacks = _stacks(names, family, prefix, stored)
        if experts.shared:
            common = {role: names[f"shared {role}"] for role in ROLES if f"shared {role}" in names}
            shared = _dense(common, experts.shared, hidden, gated=True, turned=turned)
            products |= {f"shared {role}": product for role, product in shared.items()}
        if experts.shared_gated:
            products["shared gating"] = Product((Part(names["shared gating"], 1),), hidden, exact=True)
    for role, product in products.items():
        products[role] = replace(product, parts=tuple(stored.formed(part) for part in product.parts))
    return BlockWeights(block, hidden, products, names, stacks, vectors)


def _mixer_weights(
    family: Family, names: Names, mixer: Mixer, hidden: int, paired: bool
) -> tuple[dict[str, Product], Vectors]:
    match mixer:
        case Attention():
            out = Product((Part(names["o"], hidden, turned=family.turned),), mixer.heads * mixer.width)
            return {"qkv": Product(_qkv(family, names, mixer, paired), hidden), "out": out}, {}
        case LatentAttention():
            return latent_attention_weights(names, mixer, hidden)
        case ShortConvolution():
            return convolution_weights(names, mixer, hidden)
        case DeltaRule():
            return delta_rule_weights(names, mixer, hidden)
        case StateSpace():
            return state_space_weights(names, mixer, hidden)


def _stacks(names: Mapping[str, str], family: Family, prefix: str, stored: Stored) -> Stacks:
    if not stored.stacked:
        gate, up, down = (names[f"expert {which}"] for which in ("gate", "up", "down"))
        kind = family.experts or "each"
        if kind == "halves" and "{}" in gate:  # of a family whose experts mostly have tensors of their own
            up, down = gate.replace("{}.gate_proj", "gate_up_proj"), down.replace("{}.", "")
        if kind == "each":
            forms = tuple(stored.form_of(f"{name.format(0)}.weight") for name in (gate, up, down))
        else:
            forms = None, stored.form_of(up), stored.form_of(down)
        return Stacks(gate, up, down, kind, forms, stored.kept)
    gate, up, down = (f"{prefix}mlp.experts.{which}_proj" for which in ("gate", "up", "down"))
    forms = tuple(stored.form_of(f"{name}.weight") for name in (gate, up, down))
    return Stacks(gate, up, down, "apart", forms, stored.kept)


def _dense(names: Mapping[str, str], wide: int, hidden: int, gated: bool, turned: bool) -> dict[str, Product]:
    up: tuple[Part, ...]
    if not gated:
        up = (Part(names["up"], wide, turned=turned),)
    elif "gate up" in names:
        up = (Part(names["gate up"], 2 * wide),)
    else:
        up = (Part(names["gate"], wide), Part(names["up"], wide))
    return {"up": Product(up, hidden), "down": Product((Part(names["down"], hidden, turned=turned),), wide)}


def _qkv(family: Family, names: Mapping[str, str], about: Attention, paired: bool) -> tuple[Part, ...]:
    width, rows = about.width, (about.heads * about.width, about.groups * about.width, about.groups * about.width)
    if about.gated:  # each head's query is followed by its gate
        both = np.arange(2 * rows[0], dtype=np.int64).reshape(about.heads, 2, width)
        queries, gates = both[:, 0].reshape(-1), both[:, 1].reshape(-1)
        keys = (Part(names["k"], rows[1]), Part(names["v"], rows[2]))
        query, gate = (Part(names["q"], rows[0], some, whole=2 * rows[0]) for some in (queries, gates))
        return query, *keys, gate
    if "qkv" not in names:
        turned = [paired and role != "v" for role in "qkv"]
        order = [_by_half(count // width, width) if turn else None for count, turn in zip(rows, turned, strict=True)]
        made = "q" if about.maker is not None else "qk" if about.keys_as_values else "qkv"
        parts = zip(made, rows, order, strict=False)
        return tuple(Part(names[role], count, some) for role, count, some in parts)
    if family.merged == "stacked":
        return (Part(names["qkv"], sum(rows), turned=family.turned),)
    picked = _by_group(about.groups, about.heads // about.groups, width)
    return (Part(names["qkv"], sum(rows), picked, turned=family.turned),)


@lru_cache(2)  # one for queries and one for keys
def _by_half(heads: int, width: int) -> npt.NDArray[np.int64]:
    """Where rows of heads whose rotated pairs are neighbours stand in the order of both halves of a head."""
    rows = np.arange(heads * width).reshape(heads, width // 2, 2)
    return cast(npt.NDArray[np.int64], rows.swapaxes(1, 2).reshape(-1))


@lru_cache(1)  # one for all blocks: a hostile configuration makes it 128 MB large
def _by_group(groups: int, each: int, width: int) -> npt.NDArray[np.int64]:
    """The rows of a matrix with queries, keys and values for each group, ordered as queries, keys, values."""
    rows = np.arange(groups * (each + 2) * width).reshape(groups, each + 2, width)
    order = [rows[:, :each], rows[:, each : each + 1], rows[:, each + 1 :]]
    return cast(npt.NDArray[np.int64], np.concatenate([part.reshape(-1) for part in order]))
