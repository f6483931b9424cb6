"""From config.json to what a model is made of, by its family's line in the table; transformers is not asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from peerllm.engine.graph.family import FAMILIES, Family
from peerllm.engine.graph.model import (
    Activation,
    Attention,
    Block,
    FeedForward,
    Head,
    Model,
    Norm,
    Rope,
)
from peerllm.engine.graph.rotation import KNOWN
from peerllm.engine.graph.weights import BlockWeights, Part, Product, Stacks

EVEN = 8  # what the attention operator asks of a head's width
MAX_BLOCKS = 1022  # with embedding and head as many layers as a plan has stages at most
DEFAULT_CONTEXT = 2048  # tokens, where config.json names no limit
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2", "quick_gelu": "quick_gelu",
}  # fmt: skip


class UnfitError(Exception):
    """The graph engine does not compute this model; the message says why."""


@dataclass(frozen=True, slots=True)
class Described:
    """A model and the names of its tensors (plain, see tensors.plain_name)."""

    model: Model
    blocks: tuple[BlockWeights, ...]
    embedding: str
    positions: str | None  # learned ones
    norm: str  # before the head
    output: str  # the head's matrix; where the files have none, it is the embedding
    tied: bool

    @property
    def head(self) -> Product:
        name = self.embedding if self.tied else self.output
        return Product((Part(name, self.model.vocabulary),), self.model.hidden)


class Values:
    """config.json's values under this project's names, with the family's defaults."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self._config, self._family = config, family

    def get(self, name: str, default: Any = None) -> Any:
        """A value that is there and not null, else the family's default, else `default`."""
        key = self._family.keys.get(name, name)
        value = self._config.get(key)
        if value is None and key not in self._config:
            value = self._family.defaults.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise UnfitError(f"config.json's {name} is {value!r}")
        return value

    def layer_type(self, number: int, count: int) -> str:
        kinds = self.get("layer_types")
        if kinds is None:
            return self._family.layer_type(self, number)
        if not isinstance(kinds, list) or len(kinds) != count:
            raise UnfitError("config.json's layer_types do not fit its layers")
        return str(kinds[number])


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The table's line; None: the graph engine does not know this family."""
    return FAMILIES.get(str(config.get("model_type")))


def describe(config: Mapping[str, Any]) -> Described:
    """UnfitError says what the graph engine cannot do of it."""
    family = family_of(config)
    if family is None:
        raise UnfitError(f"architecture {config.get('model_type')!r} is not in the graph engine's table")
    values = Values(config, family)
    try:
        return _described(values, family, str(config["model_type"]))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise UnfitError(f"config.json is not usable: {error}") from error


def _described(values: Values, family: Family, name: str) -> Described:
    if (reason := family.refuses(values)) is not None:
        raise UnfitError(reason)
    hidden, vocabulary, count = (values.whole(key) for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
    if count > MAX_BLOCKS:
        raise UnfitError(f"{count} layers; at most {MAX_BLOCKS} are taken")
    blocks = tuple(_block(values, family, number, count, hidden) for number in range(count))
    final = _norm(values, family)
    positions = family.names.get("positions")
    model = Model(
        name,
        hidden,
        vocabulary,
        values.whole("max_position_embeddings", DEFAULT_CONTEXT),
        blocks,
        Head(final, family.logit_scale(values), float(values.get("final_logit_softcapping", 0.0))),
        family.embedding_scale(values),
        family.position_offset if positions else None,
    )
    weights = tuple(_weights(family, model.blocks[number], number, hidden) for number in range(count))
    names = family.names
    tied = bool(values.get("tie_word_embeddings", False))
    return Described(model, weights, names["embedding"], positions, names["final"], names["output"], tied)


def _norm(values: Values, family: Family) -> Norm:
    return Norm(family.norm, float(values.get("norm_eps", 1e-5)), family.offset, family.weighted)


def _block(values: Values, family: Family, number: int, count: int, hidden: int) -> Block:
    kind = values.layer_type(number, count)
    if kind not in ("full_attention", "sliding_attention", "full_attention_no_rope"):
        raise UnfitError(f"layers of kind {kind!r}")
    norm = _norm(values, family)
    placements = family.placements(values)
    return Block(
        _attention(values, family, number, kind, hidden),
        _feed_forward(values, family, number, hidden),
        tuple((place, norm) for place in placements),
        family.parallel(values),
        float(values.get("residual_multiplier", 1.0)),
    )


def _attention(values: Values, family: Family, number: int, kind: str, hidden: int) -> Attention:
    heads = values.whole("num_attention_heads")
    groups, width = family.groups(values, heads), values.whole("head_dim", hidden // heads)
    if width % EVEN or heads % groups:
        raise UnfitError(f"{heads} heads of width {width} in {groups} groups")
    window = values.whole("sliding_window") if kind == "sliding_attention" else None
    norm = Norm(family.head_norm, float(values.get("norm_eps", 1e-5)), family.offset) if family.normed(values) else None
    return Attention(
        heads, groups, width,
        family.attention_scale(values, width, number),
        _rope(values, family, number, kind, width),
        window,
        float(values.get("attn_logit_softcapping", 0.0)),
        family.sinks,
        values.get("clip_qkv"),
        norm,
        family.norm_over,
        family.norm_after_rope,
    )  # fmt: skip


def _rope(values: Values, family: Family, number: int, kind: str, width: int) -> Rope | None:
    if not family.rotates(values, number, kind):
        return None
    about = _rope_parameters(values, kind)
    scaling_type = str(about.pop("rope_type", about.pop("type", "default")))
    if scaling_type not in KNOWN:
        raise UnfitError(f"rotary embeddings of kind {scaling_type!r}")
    theta = float(about.pop("rope_theta", None) or values.get("rope_theta", 10000.0))
    part = about.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor", 1.0)
    scaling: tuple[tuple[str, object], ...] = ()
    if scaling_type != "default":
        about.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        scaling = (("rope_type", scaling_type), *sorted(about.items()))
    return Rope(int(width * float(part)), theta, family.interleaved, scaling)


def _rope_parameters(values: Values, kind: str) -> dict[str, Any]:
    """Of layers of a kind: config.json has them for all, or by kind, or in the older keys."""
    about = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if kind in about:
        return dict(about[kind] or {})
    if any(isinstance(value, dict) for value in about.values()):
        raise UnfitError(f"rope_parameters say nothing of layers of kind {kind!r}")
    about = dict(about)
    if kind == "sliding_attention" and (local := values.get("rope_local_base_freq")) is not None:
        return {"rope_theta": local}  # the older keys: what scales does not scale windows
    return about


def _feed_forward(values: Values, family: Family, number: int, hidden: int) -> FeedForward:
    name = str(values.get("hidden_act"))
    if name not in ACTIVATIONS:
        raise UnfitError(f"activation {name!r}")
    activation = ACTIVATIONS[name]
    assert activation in get_args(Activation)
    wide = values.whole("intermediate_size", 4 * hidden)
    experts = family.experts(values, number)
    if experts is not None and activation != "silu":
        raise UnfitError(f"experts with activation {name!r}")
    return FeedForward(wide, activation, family.gated, experts)


# ---- names of tensors ---------------------------------------------------------------------------------------------


def _weights(family: Family, block: Block, number: int, hidden: int) -> BlockWeights:
    prefix = f"{family.layers}.{number}."
    names = {role: prefix + name for role, name in family.names.items()}
    about, mlp = block.attention, block.mlp
    turned = family.turned
    products = {
        "qkv": Product(_qkv(family, names, about), hidden),
        "out": Product((Part(names["o"], hidden, turned=turned),), about.heads * about.width),
    }
    stacks = None
    if mlp.experts is None:
        products |= _dense(names, mlp.wide, hidden, mlp.gated, turned)
    else:
        experts = mlp.experts
        products["router"] = Product((Part(names["router"], experts.count),), hidden, exact=True)
        stacks = Stacks(names["expert gate"], names["expert up"], names["expert down"], family.stacked)
        if experts.shared:
            common = {role: names[f"shared {role}"] for role in ("gate", "up", "down")}
            shared = _dense(common, experts.shared, hidden, gated=True, turned=turned)
            products |= {f"shared {role}": product for role, product in shared.items()}
        if experts.shared_gated:
            products["shared gating"] = Product((Part(names["shared gating"], 1),), hidden, exact=True)
    return BlockWeights(block, hidden, products, names, stacks)


def _dense(names: Mapping[str, str], wide: int, hidden: int, gated: bool, turned: bool) -> dict[str, Product]:
    up: tuple[Part, ...]
    if not gated:
        up = (Part(names["up"], wide, turned=turned),)
    elif "gate up" in names:
        up = (Part(names["gate up"], 2 * wide),)
    else:
        up = (Part(names["gate"], wide), Part(names["up"], wide))
    return {"up": Product(up, hidden), "down": Product((Part(names["down"], hidden, turned=turned),), wide)}


def _qkv(family: Family, names: Mapping[str, str], about: Attention) -> tuple[Part, ...]:
    width, rows = about.width, (about.heads * about.width, about.groups * about.width, about.groups * about.width)
    if "qkv" not in names:
        return tuple(Part(names[role], count) for role, count in zip("qkv", rows, strict=True))
    if family.merged == "stacked":
        return (Part(names["qkv"], sum(rows), turned=family.turned),)
    each = about.heads // about.groups  # in every group its queries, then its keys, then its values
    by_group = np.arange(sum(rows)).reshape(about.groups, each + 2, width)
    order = [by_group[:, :each], by_group[:, each : each + 1], by_group[:, each + 1 :]]
    picked = cast(npt.NDArray[np.int64], np.concatenate([part.reshape(-1) for part in order]))
    return (Part(names["qkv"], sum(rows), picked, turned=family.turned),)
