"""Checkpoints whose language model is one part beside others (pictures, sound): which part, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# How checkpoints of several years call the language model's part, and tensors that stand outside it.
INNER = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?=.)")
PLAIN = re.compile(r"lm_head\.|model\.(?:layers|embed_tokens|norm)\.")
OUTER = ("quantization_config", "peerllm_compute_dtype")  # values that may stand outside
MROPE = ("mrope_section", "mrope_interleaved")  # how pictures are placed; a text's tokens have one position each


@dataclass(frozen=True, slots=True)
class Wrapper:
    """`text`: the language model's type; "" is that of its own configuration, or else `usual`."""

    text: str = ""
    usual: str = "llama"
    left_out: Mapping[str, Any] = field(default_factory=dict)  # values whose defaults differ from those of `text`
    always: Mapping[str, Any] = field(default_factory=dict)


QWEN2_VL = Wrapper(
    "qwen2", left_out={"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "max_window_layers": 80}
)
QWEN3_VL = {"rope_theta": 500000.0, "max_position_embeddings": 128000}
WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("gemma3_text"),
    "gemma3n": Wrapper("gemma3n_text"),
    "gemma4": Wrapper("gemma4_text"),
    "gemma4_unified": Wrapper(
        "gemma4_text",
        left_out={"max_position_embeddings": 262144, "sliding_window": 1024},
        always={"hidden_size_per_layer_input": 0, "enable_moe_block": False},
    ),
    "idefics3": Wrapper(),
    "internvl": Wrapper(usual="qwen2"),
    "llama4": Wrapper("llama4_text"),
    "llava": Wrapper(),
    "llava_next": Wrapper(),
    "mistral3": Wrapper(usual="mistral"),
    "qwen2_5_vl": QWEN2_VL,
    "qwen2_vl": QWEN2_VL,
    "qwen3_5": Wrapper("qwen3_5_text"),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text"),
    "qwen3_vl": Wrapper("qwen3", left_out=QWEN3_VL),
    "smolvlm": Wrapper(),
}


def text_tensor(name: str) -> str | None:
    """What the language model calls a wrapper's tensor; None if the tensor belongs to another part."""
    if inner := INNER.match(name):
        rest = name[inner.end() :]
        return rest if rest.partition(".")[0] == "lm_head" else f"model.{rest}"
    return name if PLAIN.match(name) else None


def text_values(config: Mapping[str, Any], headed: bool) -> dict[str, Any]:
    """A wrapper's config.json as its language model alone would have it.

    `headed`: the files hold an output matrix, without which the embedding serves as one where config.json is silent.
    """
    wrapper = WRAPPERS[str(config.get("model_type"))]
    inner = config.get("text_config")
    nested = inner if isinstance(inner, dict) else {}
    values = dict(nested) or {  # older files have the language model's values outside
        key: value for key, value in config.items() if not key.endswith("_config") and not key.startswith("vision")
    }
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(about := values.get(key), dict):
            values[key] = {name: value for name, value in about.items() if name not in MROPE}
            for name in ("type", "rope_type"):
                if about.get(name) == "mrope":
                    values[key][name] = "default"
    for key, value in wrapper.left_out.items():
        values.setdefault(key, value)
    for key in OUTER:
        if (found := config.get(key) or nested.get(key)) is not None:
            values[key] = found
    if isinstance(about := values.get("quantization_config"), dict):
        values["quantization_config"] = {key: _text_names(value) for key, value in about.items()}
    tied = [about["tie_word_embeddings"] for about in (config, nested) if "tie_word_embeddings" in about]
    values["tie_word_embeddings"] = tied[0] if tied else not headed
    if stops := [one for about in (config, nested) for one in _listed(about.get("eos_token_id"))]:
        values["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    return {**values, **wrapper.always, "model_type": wrapper.text or nested.get("model_type") or wrapper.usual}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _text_names(value: Any) -> Any:
    """A list of modules, of which the language model's are called as in the language model."""
    names = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return [text_tensor(one) or one for one in value] if names else value
