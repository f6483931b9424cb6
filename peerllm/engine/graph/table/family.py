"""What a line of the table says of a family, and what several lines share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from peerllm.engine.graph.structure import Placement, Routing
from peerllm.engine.graph.table.names import LLAMA, Names


class ConfigReader(Protocol):
    """Reads config.json's values for a family's functions; implemented by describe.Values."""

    def get(self, name: str, default: Any = None) -> Any: ...
    def whole(self, name: str, default: int | None = None) -> int: ...
    def number(self, name: str, default: float) -> float: ...


Norms = tuple[Placement, ...]
MixerName = Literal["attention", "latent attention", "convolution", "delta rule", "state space"]
ATTENTION: Mapping[str, MixerName] = {"full_attention": "attention", "sliding_attention": "attention"}
ONE: Norms = ("before attention",)
PRE: Norms = ("before attention", "before mlp")
POST: Norms = ("after attention", "after mlp")
SANDWICH: Norms = ("before attention", "after attention", "before mlp", "after mlp")
COMMON: Mapping[str, Any] = {  # the keys that every family reads, with transformers' defaults
    "hidden_size": None, "vocab_size": None, "num_hidden_layers": None, "num_attention_heads": None,
    "num_key_value_heads": None, "head_dim": None, "intermediate_size": None, "max_position_embeddings": 2048,
    "hidden_act": "silu", "norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "rope_parameters": None, "rope_scaling": None, "original_max_position_embeddings": None,
}  # fmt: skip
RMS = {"norm_eps": "rms_norm_eps"}
LAYER = {"norm_eps": "layer_norm_eps"}
HEADS_ALONE = {"num_key_value_heads": "", "head_dim": ""}  # as many key heads as query heads, each hidden / heads wide
EPS_1E6 = {"norm_eps": 1e-6}
WINDOWS = {"sliding_window": 4096, "layer_types": None}
QWEN_WINDOWS = {**WINDOWS, "use_sliding_window": False, "max_window_layers": 28}
GRANITE_DEFAULTS = {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
}  # fmt: skip


def _no_changes(values: ConfigReader) -> dict[str, Any]:
    return {}


def windows(values: ConfigReader, number: int) -> str:
    return "full_attention" if values.get("sliding_window") is None else "sliding_attention"


def qwen_windows(values: ConfigReader, number: int) -> str:
    slides = values.get("use_sliding_window") and number >= values.get("max_window_layers", 0)
    return windows(values, number) if slides else "full_attention"


def full_at(rest: int, default: int, pattern: str = "") -> Callable[[ConfigReader, int], str]:
    """One of every `default` layers (or of config.json's `pattern`) attends fully, the others in windows."""

    def kind(values: ConfigReader, number: int) -> str:
        every = values.get(pattern, default)
        return "full_attention" if number % every == rest % every else "sliding_attention"

    return kind


def after_dense(name: str) -> Callable[[ConfigReader, int], bool]:
    """Experts are in all layers but the first, whose number config.json has as `name`."""
    return lambda values, number: bool(number >= (values.get(name, 0)))


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama. Functions are given config.json's values."""

    names: Names = field(default_factory=lambda: LLAMA)
    keys: Mapping[str, str] = field(default_factory=lambda: RMS)  # our name: config.json's; "": not read
    defaults: Mapping[str, Any] = field(default_factory=dict)  # beside COMMON; no other values are read
    by: Callable[[ConfigReader], dict[str, Any]] = _no_changes  # fields of this line that config.json's values change
    refused: str | None = None  # why the graph engine does not compute this configuration
    layers: str = "layers"  # the prefix of a block's tensors
    norm: Literal["rms", "layer"] = "rms"
    offset: float = 0.0  # added to a norm's weight
    weighted: bool = True
    placements: Norms = PRE
    parallel: bool = False
    gated: bool = True
    activation: str | None = None  # overrides config.json's
    merged: Literal["stacked", "by group"] = "stacked"  # how one matrix holds queries, keys and values
    turned: bool = False  # files hold matrices as [columns, rows]
    groups: int | None = None  # overrides config.json's
    values: Mapping[str, Any] = field(default_factory=dict)  # override config.json's, by our names
    sinks: bool = False
    gated_attention: bool = False  # see structure.Attention.gated
    mixers: Mapping[str, MixerName] = field(default_factory=lambda: ATTENTION)  # by the kind of layer
    normed: bool = False  # queries and keys are normalised
    head_norm: Literal["rms", "layer"] = "rms"
    norm_over: Literal["head", "each", "heads"] = "head"
    norm_after_rope: bool = False
    interleaved: bool = False  # rotation turns pairs of neighbours
    alpha: bool = False  # "dynamic" rotation with an alpha means a larger base
    local_theta: float | None = None  # the rotation's base in layers with a window, if it differs there
    rotates: Callable[[ConfigReader, int, str], bool] = lambda values, number, kind: True
    layer_type: Callable[[ConfigReader, int], str] = lambda values, number: "full_attention"  # without layer_types
    experts: Literal["", "each", "interleaved", "halves"] = ""  # how files hold them, see weights.Stacks
    sparse: Callable[[ConfigReader, int], bool] = lambda values, number: True  # whether a layer has experts
    routing: Routing | None = None
    by_block: Callable[[ConfigReader, int, str], Mapping[str, Any]] = lambda values, number, kind: {}  # values of one
    value_norm: bool = False  # each head's values are normalised, without a weight
    own_input: str = ""  # the value that says how many numbers of an input each block alone reads
    scaled_blocks: bool = False  # each block has a number that what comes out of it is multiplied by
    scaled_embedding: bool = False  # multiplied by the square root of its width
    position_offset: int = 0  # the row of position 0 among learned positions


def unrotated(values: ConfigReader, number: int, kind: str) -> bool:
    return False


def in_windows(values: ConfigReader, number: int, kind: str) -> bool:
    return kind == "sliding_attention"
