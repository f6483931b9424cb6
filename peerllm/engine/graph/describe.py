"""From config.json to a description of the model, by its family's line in the table and without transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peerllm.engine.graph.block_parts import Stored, block_weights
from peerllm.engine.graph.blocks.delta_rule import read_delta_rule
from peerllm.engine.graph.blocks.latent_attention import read_latent_attention
from peerllm.engine.graph.blocks.short_convolution import read_convolution
from peerllm.engine.graph.blocks.state_space import read_state_space
from peerllm.engine.graph.config_values import MAX_SIZE, MOST_SHOWN, ConfigValues, UnfitError
from peerllm.engine.graph.matrix_product import Part, Product
from peerllm.engine.graph.rotation import KNOWN, inverse_frequencies
from peerllm.engine.graph.structure import (
    Activation,
    Attention,
    Block,
    Experts,
    FeedForward,
    Head,
    Mixer,
    Model,
    Norm,
    Rope,
)
from peerllm.engine.graph.table import FAMILIES
from peerllm.engine.graph.table.family import Family
from peerllm.engine.graph.weights import BlockWeights, OwnInputs
from peerllm.engine.weights.checkpoint import STACKED_EXPERTS_KEY
from peerllm.engine.weights.formats import forms_of
from peerllm.errors import ModelError

EVEN = 8  # the attention operator needs heads whose width is a multiple of this
MAX_BLOCKS = 1022  # with embedding and head this is the most stages that a plan can have
MAX_WIDTH = 1 << 12  # of a head
MAX_EXPERTS = 1 << 12
MAX_ROW = 1 << 20  # numbers that travel for a token
SCALING_VALUES = (float, int, str, tuple, type(None))
DIVISORS = ("divisors", "long_divisors")  # of rotations, see rotation.py
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2", "quick_gelu": "quick_gelu",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Described:
    """A model and the names of its tensors, without prefixes (see checkpoint.plain_name)."""

    model: Model
    blocks: tuple[BlockWeights, ...]
    embedding: str
    positions: str | None  # of the learned positions
    norm: str  # the norm before the head
    output: str  # the head's own matrix; not used where `tied`
    tied: bool  # the head uses the embedding's matrix
    stored: Stored
    own_inputs: OwnInputs | None = None  # how the inputs of single blocks are made

    @property
    def table(self) -> Part:
        """The embedding's matrix."""
        return self._part(self.embedding)

    @property
    def head(self) -> Product:
        return Product((self._part(self.embedding if self.tied else self.output),), self.model.hidden)

    def coded_tensors(self) -> set[str]:
        """The names of the tensors that quantized matrices are made of."""
        products = [Product((self.table,), self.model.hidden), self.head]
        if self.own_inputs is not None:
            products += [Product((self.own_inputs.table,), self.own_inputs.width), self.own_inputs.projection]
        products += [product for weights in self.blocks for product in weights.products.values()]
        parts = [(product, part) for product in products for part in product.parts if part.form is not None]
        found = {name for product, part in parts for name, _ in product.part_tensors(part)}
        return found | {name for weights in self.blocks for name in weights.coded_experts()}

    def _part(self, name: str) -> Part:
        return self.stored.formed(Part(name, self.model.vocabulary))


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The table's line for a model; None if the table does not have its family."""
    return FAMILIES.get(str(config.get("model_type")))


def describe(config: Mapping[str, Any], kept: bool = False) -> Described:
    """Describe a model; UnfitError names what the graph engine cannot compute of it.

    `kept`: products compute with the numbers of a quantized checkpoint.
    """
    family = family_of(config)
    if family is None:
        raise UnfitError(f"architecture {config.get('model_type')!r} is not in the graph engine's table")
    if config.get("per_layer_config") and "per_layer_config" not in family.defaults:
        raise UnfitError("layers with configurations of their own")
    values = ConfigValues(config, family)
    try:
        family = replace(family, **family.by(values))
        if config.get(STACKED_EXPERTS_KEY) and family.experts == "each":
            family = replace(family, experts="halves")
        if family.refused is not None:
            raise UnfitError(family.refused)
        stored = _stored(config, kept)
        if stored.offset:
            family = replace(family, offset=0.0)
        family = replace(family, values={**family.values, **stored.recurrent})
        if stored.stacked:
            family = _in_gguf(family)
        return _described(ConfigValues(config, family), family, str(config["model_type"]), stored)
    except ModelError as error:
        raise UnfitError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnfitError(f"config.json is not usable: {str(error)[:MOST_SHOWN]}") from error


def _stored(config: Mapping[str, Any], kept: bool) -> Stored:
    about = config.get("quantization_config") or {}
    experts = about.get("experts")
    if experts not in (None, "stacked"):
        raise UnfitError(f"experts stored as {str(experts)[:MOST_SHOWN]!r}")
    paired, offset = (about.get(key) is True for key in ("paired", "norm_offset_added"))
    recurrent = {key: about.get(key) is True for key in ("value_heads_tiled", "decays_stored")}
    return Stored(forms_of(config), kept, paired, offset, experts is not None, recurrent)


def _in_gguf(family: Family) -> Family:
    """The family as GGUF files hold it: matrices by rows, all queries before all keys, shared gate and up apart."""
    names = dict(family.names)
    if names.get("gate up") == names.get("shared gate up") is not None:  # what serves as a shared expert elsewhere
        del names["gate up"]
        names |= {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
    if names.pop("shared gate up", None):
        names |= {f"shared {role}": f"mlp.shared_expert.{role}_proj" for role in ("gate", "up", "down")}
    return replace(family, names=names, merged="stacked", turned=False)


def _described(values: ConfigValues, family: Family, name: str, stored: Stored) -> Described:
    hidden, vocabulary, count = (values.whole(key) for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
    if count > MAX_BLOCKS:
        raise UnfitError(f"{count} layers; at most {MAX_BLOCKS} are taken")
    kinds = values.get("layer_types")
    if kinds is None:
        kinds = [family.layer_type(values, number) for number in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise UnfitError("config.json's layer_types do not fit its layers")
    blocks = tuple(_block(values, family, number, str(kind), hidden) for number, kind in enumerate(kinds))
    names, positions = family.names, family.names.get("positions")
    logits = values.number("logit_scale", 1.0) / values.number("logits_scaling", 1.0)
    model = Model(
        name,
        hidden,
        vocabulary,
        values.whole("max_position_embeddings"),
        blocks,
        Head(_norm(values, family), logits, values.number("final_logit_softcapping", 0.0)),
        math.sqrt(hidden) if family.scaled_embedding else values.number("embedding_multiplier", 1.0),
        family.position_offset if positions else None,
    )
    if model.width(0) > MAX_ROW:
        raise UnfitError(f"rows of {model.width(0)} numbers")
    weights = tuple(block_weights(family, block, number, hidden, stored) for number, block in enumerate(blocks))
    tied, own = bool(values.get("tie_word_embeddings")), None
    if each := blocks[0].own_input:
        sizes = values.whole("vocab_size_per_layer_input"), count * each
        roles = ("own inputs", "own projection")
        table, projection = (stored.formed(Part(names[role], rows)) for role, rows in zip(roles, sizes, strict=True))
        own = OwnInputs(table, Product((projection,), hidden), names["own norm"], _norm(values, family), each)
    final, output = names["final"], names["output"]
    return Described(model, weights, names["embedding"], positions, final, output, tied, stored, own)


def _norm(values: ConfigValues, family: Family) -> Norm:
    return Norm(family.norm, values.number("norm_eps", 1e-5), family.offset, family.weighted)


def _block(values: ConfigValues, family: Family, number: int, kind: str, hidden: int) -> Block:
    if kind not in family.mixers:
        raise UnfitError(f"layers of kind {kind!r}")
    norm, values = _norm(values, family), values.including(family.by_block(values, number, kind))
    own = values.get(family.own_input, 0) if family.own_input else 0
    if own:
        values.whole(family.own_input)
    return Block(
        _mixer(values, family, number, kind, hidden),
        _feed_forward(values, family, number, hidden),
        tuple((place, norm) for place in family.placements),
        bool(values.get("use_parallel_residual", family.parallel)),
        values.number("residual_multiplier", 1.0),
        own,
        family.scaled_blocks,
    )


def _mixer(values: ConfigValues, family: Family, number: int, kind: str, hidden: int) -> Mixer:
    match family.mixers[kind]:
        case "attention":
            return _attention(values, family, number, kind, hidden)
        case "latent attention":
            rope = _rope(values, family, number, kind, values.whole("qk_rope_head_dim"))
            return read_latent_attention(values, rope)
        case "convolution":
            return read_convolution(values, hidden)
        case "delta rule":
            return read_delta_rule(values)
        case "state space":
            return read_state_space(values)


def _attention(values: ConfigValues, family: Family, number: int, kind: str, hidden: int) -> Attention:
    heads = values.whole("num_attention_heads")
    groups = family.groups or values.whole("num_key_value_heads", heads)
    width = values.whole("head_dim", hidden // heads)
    if width % EVEN or heads % groups or width > MAX_WIDTH or (heads + 2 * groups) * width > MAX_SIZE:
        raise UnfitError(f"{heads} heads of width {width} in {groups} groups")
    normed = family.normed or values.get("qk_layernorm")
    clip = values.get("clip_qkv")
    return Attention(
        heads, groups, width,
        _scale(values, number, width),
        _rope(values, family, number, kind, width),
        values.whole("sliding_window") if kind == "sliding_attention" else None,
        values.number("attn_logit_softcapping", 0.0),
        family.sinks,
        float(clip) if clip else None,
        Norm(family.head_norm, values.number("norm_eps", 1e-5), family.offset) if normed else None,
        family.norm_over,
        family.norm_after_rope,
        family.gated_attention,
        Norm("rms", values.number("norm_eps", 1e-5), weighted=False) if family.value_norm else None,
        bool(values.get("keys_as_values")),
        values.get("maker"),
    )  # fmt: skip


def _scale(values: ConfigValues, number: int, width: int) -> float:
    """The factor that products of queries and keys are multiplied by."""
    scale = values.number("attention_multiplier", float(values.get("query_pre_attn_scalar", width)) ** -0.5)
    if not values.get("scale_attn_weights", True):
        scale = 1.0
    return scale / (number + 1) if values.get("scale_attn_by_inverse_layer_idx") else scale


def _rope(values: ConfigValues, family: Family, number: int, kind: str, width: int) -> Rope | None:
    if not family.rotates(values, number, kind):
        return None
    about = _rope_parameters(values, family, kind)
    scaling = str(about.pop("rope_type", about.pop("type", "default")))
    theta = float(about.pop("rope_theta", None) or values.get("rope_theta"))
    part, given = values.get("partial_rotary_factor"), about.pop("partial_rotary_factor", None)
    if scaling == "proportional":  # the whole head, but most of its pairs by nothing
        about["partial_rotary_factor"], given = given, None
    if part is None:  # the family ignores this key, but transformers' functions for scaled rotations read it
        if scaling != "default" and given not in (None, 1):
            raise UnfitError("rotary embeddings that scale, of a part that the family does not know")
        given = 1.0
    rotated = values.whole("rotary_dim", int(width * float(given or part)))
    if scaling == "dynamic" and family.alpha and about.get("alpha"):
        scaling, theta = "default", theta * about["alpha"] ** (width / (width - 2))
    if scaling == "default":
        about = {}
    else:
        length = values.get("max_position_embeddings")
        about = {"rope_type": scaling, "original_max_position_embeddings": length, **about}
    if scaling not in KNOWN or rotated > width:
        raise UnfitError(f"rotary embeddings of kind {scaling!r}, {rotated} of {width} numbers")
    about |= {key: tuple(map(float, about[key])) for key in DIVISORS if key in about}
    if not math.isfinite(theta) or not all(isinstance(value, SCALING_VALUES) for value in about.values()):
        raise UnfitError(f"rotary embeddings of kind {scaling!r} with {str(about)[:MOST_SHOWN]}")
    rope = Rope(rotated, theta, family.interleaved, tuple(sorted(about.items())))
    with np.errstate(all="raise", under="ignore"):
        inverse_frequencies(rope)  # raises now what would otherwise be raised while loading
    return rope


def _rope_parameters(values: ConfigValues, family: Family, kind: str) -> dict[str, Any]:
    """The rotation's parameters for a kind of layer: in config.json for all layers, by kind, or in older keys."""
    about, older = values.get("rope_parameters", {}), values.get("rope_scaling", {})
    if family.local_theta is not None:
        if kind == "sliding_attention":
            about = {"rope_theta": values.get("rope_local_base_freq", family.local_theta), **(about.get(kind) or {})}
        else:
            about = {**(about.get(kind) or {}), **older}
        about.pop("truncate", None)  # transformers does not read it from here
        return about
    about = dict(older or about)
    if any(isinstance(value, dict) for value in about.values()):
        raise UnfitError("rope_parameters by kind of layer")
    if (length := values.get("original_max_position_embeddings")) is not None:
        about["original_max_position_embeddings"] = length
    return about


def _feed_forward(values: ConfigValues, family: Family, number: int, hidden: int) -> FeedForward:
    name = family.activation or str(values.get("hidden_act"))
    if name not in ACTIVATIONS:
        raise UnfitError(f"activation {name!r}")
    experts = _experts(values, family, number)
    if experts is not None and ACTIVATIONS[name] != "silu":
        raise UnfitError(f"experts with activation {name!r}")
    return FeedForward(values.whole("intermediate_size", 4 * hidden), ACTIVATIONS[name], family.gated, experts)


def _experts(values: ConfigValues, family: Family, number: int) -> Experts | None:
    if not family.experts or number in values.get("mlp_only_layers", ()) or not family.sparse(values, number):
        return None
    if (number + 1) % values.get("decoder_sparse_step", 1):
        return None
    counted = "num_local_experts" if values.get("num_local_experts") else "num_experts"
    count, used = values.whole(counted), values.whole("num_experts_per_tok")
    if not used <= count <= MAX_EXPERTS:
        raise UnfitError(f"{used} of {count} experts")
    routing = family.routing
    if routing is not None and routing.groups_used < routing.groups:
        each, rest = divmod(count, routing.groups)
        if rest or each < routing.best or used > routing.groups_used * each:
            raise UnfitError(f"{used} of {count} experts in {routing.groups} groups")
    shared = values.whole("shared_expert_intermediate_size") if values.get("shared_expert_intermediate_size") else 0
    wide = "moe_intermediate_size" if values.get("moe_intermediate_size") else "intermediate_size"
    return Experts(
        count, used, values.whole(wide),
        bool(values.get("norm_topk_prob", True)),
        values.number("swiglu_alpha", 1.0), float(family.experts == "interleaved"), values.number("swiglu_limit", 0.0),
        shared, shared > 0 and "shared gating" in family.names, routing,
    )  # fmt: skip
