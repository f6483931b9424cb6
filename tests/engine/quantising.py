"""A tiny model's files, quantized in place as published checkpoints are, and the float model that they stand for."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from peerllm.engine.weights.checkpoint import mapped, read_tensors
from tests.engine.weights.packers import METHODS, MXFP4, Array, mxfp4

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
LINEAR = re.compile(r"\.layers\.\d+\..*\.weight$")
ROUTER = re.compile(r"\.(gate|router|shared_expert_gate)\.weight$")
GPT_OSS = re.compile(r"\.experts\.(gate_up|down)_proj$")


def write(directory: Path, tensors: dict[str, Array], config: dict[str, Any]) -> None:
    """The files of a model directory."""
    directory.mkdir(exist_ok=True)
    header: dict[str, Any] = {}
    start = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": CODES[array.dtype.name], "shape": array.shape, "data_offsets": (start, start + array.nbytes)
        }  # fmt: skip
        start += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
    (directory / "config.json").write_text(json.dumps(config))


def quantise(directory: Path, method: str, meant: Path) -> None:
    """Quantize the model in `directory` and write the float32 model with the same weights to `meant`."""
    config = json.loads((directory / "config.json").read_text())
    tensors = {name: np.array(mapped(tensor)) for name, tensor in read_tensors(directory).items()}
    stored, floats = {}, {}
    for name, array in tensors.items():
        if method == "MXFP4" and GPT_OSS.search(name):
            made = mxfp4(array.swapaxes(1, 2))
            stored |= {f"{name}{kind}": one for kind, one in made.tensors.items()}
            floats[name] = np.ascontiguousarray(made.weights.swapaxes(1, 2), np.float32)
        elif method != "MXFP4" and array.ndim == 2 and LINEAR.search(name) and not ROUTER.search(name):
            made = METHODS[method].store(array)
            stored |= {f"{name.removesuffix('weight')}{kind}": one for kind, one in made.tensors.items()}
            floats[name] = made.weights.astype(np.float32)
        else:
            stored[name] = floats[name] = array
    assert any(floats[name] is not array for name, array in tensors.items())
    about = MXFP4 if method == "MXFP4" else METHODS[method].about
    write(meant, floats, config)
    write(directory, stored, {**config, "quantization_config": about})
    assert math.prod(next(iter(floats.values())).shape)
