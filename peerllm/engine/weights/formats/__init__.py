"""The forms in which checkpoints store rounded matrices, each read as whole numbers without rounding again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peerllm.engine.weights.checkpoint import plain_name
from peerllm.engine.weights.formats.coded_rows import WeightForm
from peerllm.engine.weights.formats.ggml import GGMLForm
from peerllm.engine.weights.formats.published import published_forms
from peerllm.errors import ModelError

FormOf = Callable[[str], WeightForm | None]  # by a matrix' plain name, as a float checkpoint has it; None: floats


def forms_of(config: Mapping[str, Any]) -> FormOf:
    """How config.json's quantization_config says that matrices are stored; ModelError if that is not read."""
    about = config.get("quantization_config")
    if not about:
        return lambda name: None
    method = about.get("quant_method") if isinstance(about, dict) else None
    if method == "gguf":
        return _ggml_forms(about)
    if method is None:
        raise ModelError("config.json's quantization_config names no quant_method")
    return published_forms(about, config)


def _ggml_forms(about: Mapping[str, Any]) -> FormOf:
    types = about.get("types")
    if not isinstance(types, dict):
        raise ModelError("config.json's quantization_config has no types")
    known = {kind: GGMLForm(kind) for kind in {str(kind) for kind in types.values()}}
    forms = {plain_name(str(name)): known[str(kind)] for name, kind in types.items()}
    return forms.get
