"""In which form a model is computed: dtype and rounding, and what else config.json says whatever computes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peerllm.engine.checkpoint import read_json
from peerllm.engine.messages import Inspect, TensorAt
from peerllm.errors import ModelError
from peerllm.types import BITS

FILE_DTYPES = {"F32": "float32", "F64": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPES = ("float32", "bfloat16", "float16")
COMPUTE_DTYPE_KEY = "peerllm_compute_dtype"  # in config.json: what "auto" means for this model, whatever its file holds


def form_of(
    asked: Inspect, config: Mapping[str, Any], tensors: Iterable[TensorAt], accelerator: bool = False
) -> tuple[str, str]:
    """(dtype, what matrices are rounded to: "", "int8" or "int4").

    A dtype "auto" is what config.json's own key says, else what most bytes of the files hold. Rounding "auto" is int8
    for such a 16-bit model on processors, where that is twice as fast, and none elsewhere or where a dtype was asked for.
    """
    dtype = asked.dtype
    if dtype == "auto":
        dtype = config.get(COMPUTE_DTYPE_KEY) or _most(tensors)
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of auto, {', '.join(DTYPES)}, not {dtype!r}")
    if asked.quantize in BITS:
        return dtype, asked.quantize
    if asked.quantize not in ("auto", "none", ""):
        raise ModelError(f"quantize must be one of auto, none, {', '.join(BITS)}, not {asked.quantize!r}")
    rounds = asked.quantize == "auto" and asked.dtype == "auto" and dtype != "float32" and not accelerator
    return dtype, "int8" if rounds else ""


def _most(tensors: Iterable[TensorAt]) -> str:
    held: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype in FILE_DTYPES:
            name = FILE_DTYPES[tensor.dtype]
            held[name] = held.get(name, 0) + tensor.nbytes
    return max(held, key=lambda name: held[name], default="float32")


def stop_ids(config: Mapping[str, Any], model_dir: Path) -> tuple[int, ...]:
    """End-of-sequence ids of config.json and generation_config.json."""
    text = config.get("text_config")
    values = [config.get("eos_token_id"), text.get("eos_token_id") if isinstance(text, dict) else None]
    if (generation := model_dir / "generation_config.json").is_file():
        values.append(read_json(generation).get("eos_token_id"))
    found: set[int] = set()
    for value in values:
        found.update(number for number in (value if isinstance(value, list) else [value]) if type(number) is int)
    return tuple(sorted(found))
