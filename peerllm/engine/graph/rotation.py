"""Cosines and sines of rotary position embeddings, as transformers computes them (in float32)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from peerllm.engine.base import Floats
from peerllm.engine.graph.structure import Rope

# The others depend on the longest position.
KNOWN = frozenset(["default", "linear", "llama3", "yarn", "divided", "proportional"])


def tables(rope: Rope, positions: int) -> tuple[Floats, Floats]:
    """Cosines and sines [positions, width / 2] for positions from 0."""
    frequencies, factor = inverse_frequencies(rope, positions)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None]
    scale = np.float32(factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def inverse_frequencies(rope: Rope, positions: int = 0) -> tuple[Floats, float]:
    """Radians per position of each pair [width / 2], and the factor for cosines and sines.

    `positions`: how many there are at the most.
    """
    about: dict[str, Any] = dict(rope.scaling)
    kind = about.get("rope_type", "default")
    exponents = np.arange(0, rope.width, 2, dtype=np.float32) / np.float32(rope.width)
    powers = np.power(float(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    plain: Floats = np.float32(1.0) / powers
    match kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / np.float32(about["factor"]), 1.0
        case "llama3":
            return _llama3(plain, about), 1.0
        case "yarn":
            return _yarn(powers, rope, about)
        case "proportional":  # the last pairs of a head do not turn
            turned = int(float(about.get("partial_rotary_factor") or 1.0) * rope.width // 2)
            plain[turned:] = 0.0
            return plain / np.float32(about.get("factor") or 1.0), 1.0
        case "divided":
            return _divided(plain, about, positions)
    raise ValueError(f"unknown rotation {kind!r}")


def _llama3(plain: Floats, about: dict[str, Any]) -> Floats:
    factor, low, high = about["factor"], about["low_freq_factor"], about["high_freq_factor"]
    length = about["original_max_position_embeddings"]
    wave = 2 * math.pi / plain
    smooth = (length / wave - low) / (high - low)
    mixed = (1 - smooth) * plain / factor + smooth * plain
    out = np.where(wave > length / low, plain / factor, plain)
    medium = (wave <= length / low) & (wave >= length / high)
    return np.where(medium, mixed, out).astype(np.float32)


def magnitude(factor: float, weight: float = 1.0) -> float:
    """By how much queries and keys grow where positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(powers: Floats, rope: Rope, about: dict[str, Any]) -> tuple[Floats, float]:
    factor, width, theta = about["factor"], rope.width, rope.theta
    length = about["original_max_position_embeddings"]
    attention = about.get("attention_factor")
    if attention is None:
        weight, all_dims = about.get("mscale"), about.get("mscale_all_dim")
        attention = magnitude(factor)
        if weight and all_dims:
            attention = magnitude(factor, weight) / magnitude(factor, all_dims)

    def dimension(rotations: float) -> float:
        return (width * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(about.get("beta_fast") or 32), dimension(about.get("beta_slow") or 1)
    if about.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    kept = 1 - ramp
    plain, stretched = 1.0 / powers, 1.0 / (np.float32(factor) * powers)
    return (stretched * (1 - kept) + plain * kept).astype(np.float32), float(attention)


def _divided(plain: Floats, about: dict[str, Any], positions: int) -> tuple[Floats, float]:
    """Frequencies over divisors from a GGUF file: one list, or one for short contexts and one for longer ones.

    As in llama.cpp the context that is served chooses the list. (transformers' "longrope" lets each sequence choose and
    change in its middle, when keys have been rotated already.)
    """
    lists = {key: np.asarray(about[key], np.float32) for key in ("divisors", "long_divisors") if key in about}
    if any(some.shape != plain.shape or not (some > 0).all() for some in lists.values()):
        raise ValueError(f"divisors for {len(plain)} frequencies")
    longer = "long_divisors" in lists and positions > about["original_max_position_embeddings"]
    return plain / lists["long_divisors" if longer else "divisors"], float(about.get("attention_factor", 1.0))
