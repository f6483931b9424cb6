"""A GGUF file's hyperparameters, read with care: each has a kind, a default and a line that says what is wrong."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError
from peerllm.regular_files import open_regular

MAX_WHOLE = 1 << 40
MAX_BLOCKS = 1022  # as the engine takes
MAX_HEADS = 1 << 15
NO_TURN = 1e20  # a frequency divided by this turns nothing
MAX_DIVISORS = 1 << 12  # half a head's width
BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)")
MOST_SHOWN = 60  # characters of a value in a message


class Hyperparameters:
    """The metadata of one architecture, and what its tensors' names and shapes tell."""

    def __init__(self, file: str, metadata: Mapping[str, Any], tensors: Mapping[str, TensorAt]) -> None:
        self._file, self._metadata, self._tensors = file, metadata, tensors
        self.architecture = str(metadata.get("general.architecture", ""))
        self.blocks = self.whole("block_count") - self.whole("nextn_predict_layers", 0)
        if not 1 <= self.blocks <= MAX_BLOCKS:
            raise self.wrong(f"has {self.blocks} blocks; 1 to {MAX_BLOCKS} are taken")
        self.hidden = self.whole("embedding_length")
        heads = self.whole("attention.head_count")
        self._heads = heads
        self.width = self.whole("attention.key_length", self.hidden // max(heads, 1))
        if not 1 <= heads <= MAX_HEADS or not self.width:
            raise self.wrong(f"has {heads} heads of width {self.width}")

    def wrong(self, what: str) -> ModelError:
        return ModelError(f"{self._file} (architecture {self.architecture}) {what}")

    def get(self, key: str, default: Any = None) -> Any:
        """The architecture's value called `key`; an array with one value for all blocks is that value."""
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, array) and len(set(value)) == 1:
            return value[0]
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise self.wrong(f"does not say its {key}")
        if type(value) is not int or not 0 <= value <= MAX_WHOLE:
            if isinstance(value, array):
                raise self.wrong(f"has blocks that differ in {key}, which is not computed")
            raise self.wrong(f"says {key} is {str(value)[:MOST_SHOWN]}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(f"says {key} is {str(value)[:MOST_SHOWN]}")
        return float(value)

    @property
    def groups(self) -> int:
        """Heads of keys and values; an array has zeros for blocks without attention."""
        given = self.get("attention.head_count_kv")
        if isinstance(given, array) and len(set(given) - {0}) == 1:
            return int(max(given))
        return self.whole("attention.head_count_kv", self._heads)

    def each(self, key: str, default: int) -> list[int]:
        """The value of every block, which may differ."""
        given = self.get(key, default)
        if not isinstance(given, array):
            return [self.whole(key, default)] * self.blocks
        if len(given) < self.blocks or not all(type(one) is int and 0 < one <= MAX_WHOLE for one in given):
            raise self.wrong(f"says {key} is {str(list(given))[:MOST_SHOWN]}")
        return list(given[: self.blocks])

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def has(self, stem: str, block: int = 0) -> bool:
        """Whether a block has a tensor "`stem`.weight"."""
        return f"blk.{block}.{stem}.weight" in self._tensors

    def rows(self, stem: str) -> int | None:
        """Rows of a matrix that is the same in all blocks which have it; None if none has it."""
        for number in range(self.blocks):
            if (tensor := self._tensors.get(f"blk.{number}.{stem}.weight")) is not None:
                return tensor.shape[-2] if len(tensor.shape) > 1 else 1
        return None

    def kinds(self, name: str, kind: str) -> list[str]:
        """Each block's kind: `kind` where it has the tensor `name`, else attention."""
        found = (f"blk.{number}.{name}" in self._tensors for number in range(self.blocks))
        return [kind if one else "full_attention" for one in found]

    def rows_beside(self, stem: str) -> int | None:
        """Rows of a matrix beside the blocks; None if there is none."""
        tensor = self._tensors.get(f"{stem}.weight")
        return None if tensor is None or len(tensor.shape) != 2 else tensor.shape[0]

    # ---- parts of config.json ---------------------------------------------------------------------------------------

    def experts(
        self, count: str, width: str = "intermediate_size", normalised: bool | None = None, dense: int = 0
    ) -> dict[str, Any]:
        """Experts; `count` and `width` are the family's keys for how many there are and how wide each is.

        The first `dense` blocks have none.
        """
        if self.number("expert_weights_scale", 1.0) not in (0.0, 1.0) or self.whole("expert_group_count", 0) > 1:
            raise self.wrong("chooses experts by groups or scales them, which is not computed")
        about: dict[str, Any] = {
            count: self.whole("expert_count"), "num_experts_per_tok": self.whole("expert_used_count"),
            width: self.rows("ffn_up_exps"),
        }  # fmt: skip
        if normalised is not None:
            about["norm_topk_prob"] = bool(self.get("expert_weights_norm", normalised))
        for number in range(dense, self.blocks):
            if not self.has("ffn_up_exps", number):
                raise self.wrong(f"has no stacks of experts in block {number}, which is not computed")
        return about

    def windows(self, every: int, default: int = 0) -> dict[str, Any]:
        """Windows in all blocks but one of `every`, unless the file says in which."""
        window = self.whole("attention.sliding_window", default)
        pattern = self._metadata.get(f"{self.architecture}.attention.sliding_window_pattern", every)
        if isinstance(pattern, array) and len(pattern) >= self.blocks:
            slides = [bool(one) for one in pattern[: self.blocks]]
        elif type(pattern) is int and pattern >= 1:
            slides = [number % pattern < pattern - 1 for number in range(self.blocks)]
        else:
            raise self.wrong(f"says attention.sliding_window_pattern is {str(pattern)[:MOST_SHOWN]}")
        kinds = ["sliding_attention" if one and window else "full_attention" for one in slides]
        return {"sliding_window": window or None, "layer_types": kinds}

    def scaling(self) -> dict[str, Any]:
        """How rotations are stretched, as config.json's rope_scaling; empty if they are not."""
        kind = str(self.get("rope.scaling.type", "linear"))
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0)) or 1.0
        length = self.whole("rope.scaling.original_context_length", self.whole("context_length"))
        stretched = kind != "none" and factor != 1.0
        divisors = {name: self._divisors(f"{name}.weight") for name in ("rope_freqs", "rope_factors_short")}
        if any(divisors.values()):
            if stretched and kind != "longrope":
                raise self.wrong("divides its rotations twice, which is not computed")
            about: dict[str, Any] = {"rope_type": "divided"}
            about["divisors"] = divisors["rope_freqs"] or divisors["rope_factors_short"]
            if further := self._divisors("rope_factors_long.weight"):
                about |= {"long_divisors": further, "original_max_position_embeddings": length}
                about["attention_factor"] = self.number("rope.scaling.attn_factor", 1.0)
            return about
        if not stretched:
            return {}
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            raise self.wrong(f"stretches its rotations as {kind[:MOST_SHOWN]!r}, which is not computed")
        about = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        for ours, key in (
            ("attention_factor", "attn_factor"), ("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow"),
        ):  # fmt: skip
            if value := self.number(f"rope.scaling.{key}", 0.0):
                about[ours] = value
        return about

    def turning(self, width: int) -> float:
        """The share of a head's pairs that are rotated at all, where the file gives the others a huge divisor."""
        found = self._divisors("rope_freqs.weight") or [1.0] * (width // 2)
        turned = found.count(1.0)
        if len(found) != width // 2 or found[:turned] != [1.0] * turned or any(one < NO_TURN for one in found[turned:]):
            raise self.wrong("divides its rotations in a way that is not computed")
        return turned * 2 / width

    def _divisors(self, name: str) -> list[float]:
        """The numbers of a small float32 tensor; empty if there is none."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return []
        if tensor.dtype != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MAX_DIVISORS:
            raise self.wrong(f"has {name} of {tensor.dtype} {list(tensor.shape)}")
        with open_regular(tensor.path) as file:
            file.seek(tensor.offset)
            found = np.frombuffer(file.read(tensor.nbytes), "<f4")
        if len(found) != tensor.shape[0] or not (np.isfinite(found) & (found > 0)).all():
            raise self.wrong(f"has unusable numbers in {name}")
        return [float(one) for one in found]


def block_of_tensor(name: str) -> tuple[int, str] | None:
    """The block's number and the rest of a tensor's name; None for tensors beside the blocks."""
    found = BLOCK.fullmatch(name)
    return (int(found[1]), found[2]) if found else None
