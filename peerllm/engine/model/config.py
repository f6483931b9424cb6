"""config.json's text as a transformers configuration, and what follows from the configuration alone."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from peerllm.engine.families import FAMILIES
from peerllm.engine.graph.describe import MAX_BLOCKS
from peerllm.engine.weights.checkpoint import refuse_quantised
from peerllm.errors import ModelError, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_COUNT = 1 << 15  # of layers, heads, experts, labels: configuration classes make lists of that length
COUNTS = re.compile(r"(layers?|heads?|experts|labels|groups?|blocks|num_inputs)$")
# Keys that choose the code to run and may name a repository for it; parts of a configuration can have them, too.
CODE_KEYS = frozenset(
    ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
)
DEFAULT_CONTEXT = 2048  # tokens, where the architecture names no limit


def parse_config(text: str) -> Any:
    """The PretrainedConfig of config.json's text; ModelError if it cannot be divided. Code named in it never runs."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        values = json.loads(text, object_hook=_harmless)
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"config.json is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError("config.json holds no JSON object")
    kind = values.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError("config.json names no model_type")
    if kind not in CONFIG_MAPPING:
        hint = " (it needs code of its own, which is never run)" if "auto_map" in values else ""
        raise ModelError(f"unknown architecture {kind!r}{hint}")
    if values.get("is_encoder_decoder"):
        raise ModelError(f"architecture {kind!r} is an encoder-decoder, which cannot be divided")
    if kind not in FAMILIES:
        raise ModelError(f"architecture {kind!r} is not among those that peerllm can divide")
    refuse_quantised(values)
    for key in ("auto_map", "torch_dtype", "dtype"):
        values.pop(key, None)
    try:
        config = CONFIG_MAPPING[kind].from_dict(values)
        count, hidden = text_config(config).num_hidden_layers, text_config(config).hidden_size
    except Exception as error:  # configuration classes raise exceptions of every kind
        raise ModelError(f"config.json of {kind!r} is not usable: {one_line(error)}") from error
    if not (isinstance(count, int) and 1 <= count <= MAX_BLOCKS and isinstance(hidden, int) and hidden > 0):
        raise ModelError(f"config.json of {kind!r} is not usable: {count} layers of width {hidden}")
    return config


def _harmless(value: dict[str, Any]) -> Any:
    """Drop keys that choose code and bound counts; {"__float__": "Infinity"} is how transformers writes infinity."""
    if value.get("__float__") in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    for key, count in value.items():
        if isinstance(count, int) and count > MAX_COUNT and COUNTS.search(key):
            raise ModelError(f"config.json is not usable: {key} is {count}, at most {MAX_COUNT} is taken")
    return {key: held for key, held in value.items() if key not in CODE_KEYS}


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config(decoder=True)


def max_context(config: Any) -> int:
    """The most tokens the architecture was made for."""
    text = text_config(config)
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_CONTEXT
