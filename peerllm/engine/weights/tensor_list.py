"""tensors.json: where the tensors of a directory lie, if they lie in files that are no safetensors (GGUF)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError
from peerllm.regular_files import read_regular
from peerllm.stored_types import stored_bytes

MAX_LIST_BYTES = 64 << 20
MAX_SIDES = 8
KINDS: Mapping[str, type] = {"name": str, "dtype": str, "shape": list, "path": str, "offset": int, "nbytes": int}


def listed_tensors(file: Path) -> list[TensorAt]:
    """The tensors of a tensors.json; ModelError if one cannot be where it is said to be."""
    try:
        entries = orjson.loads(read_regular(file, MAX_LIST_BYTES))
    except (OSError, orjson.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise ModelError(f"{file.name} holds no list")
    tensors: list[TensorAt] = []
    sizes: dict[str, int] = {}
    for entry in entries:
        tensor = _tensor(file, entry)
        if tensor.path not in sizes:
            sizes[tensor.path] = _size(tensor.path)
            if not tensor.path.lower().endswith(".gguf"):  # a copied directory must not name other files of this disk
                raise ModelError(f"{file.name} names {tensor.path[:200]}, which is no GGUF file")
        if tensor.offset + tensor.nbytes > sizes[tensor.path]:
            raise ModelError(
                f"{Path(tensor.path).name} is cut short or another file than before: tensor {tensor.name} ends at byte "
                f"{tensor.offset + tensor.nbytes} of {sizes[tensor.path]}"
            )
        tensors.append(tensor)
    return tensors


def _tensor(file: Path, entry: Any) -> TensorAt:
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in KINDS.items()):
        raise ModelError(f"{file.name} has a malformed entry")
    shape = tuple(entry["shape"])
    numbers = (*shape, entry["offset"], entry["nbytes"])
    if len(shape) > MAX_SIDES or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ModelError(f"{file.name}: the entry for {entry['name'][:100]} is malformed")
    if stored_bytes(entry["dtype"], shape) != entry["nbytes"] or not Path(entry["path"]).is_absolute():
        raise ModelError(f"{file.name}: the entry for {entry['name'][:100]} is malformed")
    return TensorAt(entry["name"], entry["dtype"], shape, entry["path"], entry["offset"], entry["nbytes"])


def _size(path: str) -> int:
    try:
        if Path(path).is_file():
            return Path(path).stat().st_size
    except (OSError, ValueError) as error:
        raise ModelError(f"the model's file {path[:200]} cannot be read: {error}") from error
    raise ModelError(f"the model's file {path[:200]} is gone; put it back, or run the model from where it is now")
