"""How much memory each of the demo's devices lends, so that only all of them together hold the model.

Blocks are dealt out evenly; a device lends what its part takes, what a pass works with, and SPARE_BLOCKS of a block
more, which never makes room for the part of another.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerllm.errors import ModelError
from peerllm.planner.memory import Shape, working_bytes

SPARE_BLOCKS = 0.75  # of a block's size
MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:embed|wte|wpe)")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes in the compute dtype, KV included: embedding, each block, and the head (beside the embedding)."""

    embedding: int
    blocks: tuple[int, ...]
    head: int
    working: int  # of a pass, on every device

    @property
    def total(self) -> int:
        """On one device alone."""
        return self.embedding + sum(self.blocks) + self.head + self.working


def limits(sizes: Sizes, devices: int) -> list[int]:
    """What each device lends; the first is the source and keeps embedding and head."""
    if devices > len(sizes.blocks):
        raise ModelError(f"the model has {len(sizes.blocks)} blocks, too few for {devices} devices")
    spare = math.ceil(SPARE_BLOCKS * min(sizes.blocks))
    parts = even_runs(len(sizes.blocks), devices)
    found = [sum(sizes.blocks[start:end]) + sizes.working + spare for start, end in parts]
    found[0] += sizes.embedding + sizes.head
    return found


def even_runs(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` things in `parts` neighbouring runs that differ by one at most; the later runs are the longer ones."""
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def sizes_of(model_dir: Path, slots: int, context: int, element_bytes: int | None = None) -> Sizes:
    """From config.json and the safetensors headers; `element_bytes` of the compute dtype, None: as in the files."""
    try:
        config = json.loads((model_dir / "config.json").read_bytes())
        headers = [_header(path) for path in sorted(model_dir.glob("*.safetensors"))]
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{model_dir} is no model directory: {error}") from error
    tensors = {name: entry for header in headers for name, entry in header.items() if name != "__metadata__"}
    return _sizes(config.get("text_config") or config, tensors, slots, context, element_bytes)


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} has a header of {length} bytes")
        value = json.loads(file.read(length))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} has no safetensors header")
    return value


def _sizes(
    config: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Any]],
    slots: int,
    context: int,
    element_bytes: int | None,
) -> Sizes:
    embedding = head = 0
    blocks: dict[int, int] = {}
    width = 0
    for name, entry in tensors.items():
        width = element_bytes or _BYTES.get(entry["dtype"], 4)
        nbytes = math.prod(entry["shape"]) * width
        block = _BLOCK.search(name)
        if block:
            blocks[int(block[1])] = blocks.get(int(block[1]), 0) + nbytes
        elif _EMBEDDING.search(name):
            embedding += nbytes
        else:
            head += nbytes
    if not blocks or not embedding:
        raise ModelError("the safetensors files hold no blocks and embedding that are known here")
    kv = 2 * width * _kv_values(config) * slots * context
    hidden = _first(config, "hidden_size", "n_embd")
    wide = config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden
    working = working_bytes(Shape(hidden, _first(config, "vocab_size"), wide, width), context, slots)
    return Sizes(embedding, tuple(blocks[index] + kv for index in sorted(blocks)), head, working)


def _kv_values(config: Mapping[str, Any]) -> int:
    """Values that one token's key (or value) has in one block."""
    hidden = _first(config, "hidden_size", "n_embd")
    heads = _first(config, "num_attention_heads", "n_head")
    return int((config.get("num_key_value_heads") or heads) * (config.get("head_dim") or hidden // heads))


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ModelError(f"config.json says nothing of {names[0]}")
