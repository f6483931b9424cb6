"""Matrices stored as published formats define them, written from their specifications, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns of the transposed matrix in a word, lowest bits first
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Stored:
    """A matrix' tensors by what follows the layer's name, and its weights [rows, columns] in float64."""

    tensors: dict[str, Array]
    weights: npt.NDArray[np.float64]


@dataclass
class Method:
    """A way to quantize: config.json's quantization_config, and how matrices are stored. `bits` 0: floats."""

    about: dict[str, Any]
    store: Callable[[Array], Stored]
    bits: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def words(codes: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """Unsigned codes packed into int32 along an axis, the first in the lowest bits."""
    each = 32 // bits
    moved = np.moveaxis(codes, axis, -1).astype(np.uint32)
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % each)])
    apart = moved.reshape(*moved.shape[:-1], -1, each)
    made = np.zeros(apart.shape[:-1], np.uint32)
    for place in range(each):
        made |= apart[..., order[place] if order else place] << np.uint32(bits * place)
    return np.ascontiguousarray(np.moveaxis(made, -1, axis)).view(np.int32)


def grouped(
    weights: Array, bits: int, places: Array, symmetric: bool, dtype: Any = np.float16
) -> tuple[Array, Array, Array, npt.NDArray[np.float64]]:
    """Codes [rows, columns], scales and zeros [rows, groups] of columns in groups `places`, and the weights meant."""
    count, most = int(places.max()) + 1, (1 << bits) - 1
    scales, zeros = np.empty((len(weights), count), dtype), np.empty((len(weights), count), np.int64)
    for group in range(count):
        some = weights[:, places == group].astype(np.float64)
        low, high = np.minimum(some.min(1), 0), np.maximum(some.max(1), 0)
        if symmetric:
            scales[:, group], zeros[:, group] = np.abs(some).max(1) * 2 / most, (most + 1) // 2
        else:
            scales[:, group] = (high - low) / most
            zeros[:, group] = np.clip(np.rint(-low / scales[:, group].astype(np.float64)), 0, most)
    each, zero = scales[:, places].astype(np.float64), zeros[:, places]
    codes = np.clip(np.rint(weights / each) + zero, 0, most).astype(np.int64)
    return codes, scales, zeros, (codes - zero) * each


def places_of(columns: int, group: int, shuffled: bool = False) -> Array:
    """Each column's group: neighbours, or (`shuffled`) wherever activations put them."""
    places = np.arange(columns) // (columns if group == -1 else group)
    return np.random.default_rng(columns).permutation(places) if shuffled else places


def gptq(bits: int, group: int, symmetric: bool, ordered: bool = False, version: str = "gptq") -> Method:
    def store(weights: Array) -> Stored:
        places = places_of(weights.shape[1], group, ordered)
        codes, scales, zeros, meant = grouped(weights, bits, places, symmetric)
        most = (1 << bits) - 1
        stored = zeros.T - 1 & most if version == "gptq" else zeros.T
        tensors = {
            "qweight": words(codes.T, bits, 0), "qzeros": words(stored, bits, 1),
            "scales": np.ascontiguousarray(scales.T), "g_idx": places.astype(np.int32),
        }  # fmt: skip
        return Stored(tensors, meant)

    about = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered,
        "checkpoint_format": version, "damp_percent": 0.01,
    }  # fmt: skip
    return Method(about, store, bits)


def awq(group: int) -> Method:
    def store(weights: Array) -> Stored:
        codes, scales, zeros, meant = grouped(weights, 4, places_of(weights.shape[1], group), False)
        tensors = {
            "qweight": words(codes.T, 4, 1, AWQ_ORDER), "qzeros": words(zeros.T, 4, 1, AWQ_ORDER),
            "scales": np.ascontiguousarray(scales.T),
        }  # fmt: skip
        return Stored(tensors, meant)

    about = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Method(about, store, 4)


def compressed(
    bits: int, strategy: str, symmetric: bool = True, kind: str = "pack-quantized", group: int = 32,
    ordered: bool = False, plain_zeros: bool = False,
) -> Method:  # fmt: skip
    def store(weights: Array) -> Stored:
        places = places_of(weights.shape[1], group if strategy == "group" else -1, ordered)
        flat = weights.reshape(1, -1) if strategy == "tensor" else weights
        codes, scales, zeros, meant = grouped(
            flat, bits, np.zeros(flat.shape[1], int) if strategy == "tensor" else places, symmetric, ml_dtypes.bfloat16
        )
        codes, meant, offset = codes.reshape(weights.shape), meant.reshape(weights.shape), 1 << (bits - 1)
        tensors: dict[str, Array] = {"weight_scale": scales.reshape(-1) if strategy == "tensor" else scales}
        if kind == "pack-quantized":
            tensors |= {"weight_packed": words(codes, bits, 1), "weight_shape": np.array(weights.shape, np.int64)}
        else:
            tensors["weight"] = (codes - offset).astype(np.int8)
        if not symmetric:
            packed = kind == "pack-quantized" and not plain_zeros
            signed = (zeros - offset).astype(np.int8)
            signed = signed.reshape(-1) if strategy == "tensor" else signed
            tensors["weight_zero_point"] = words(zeros, bits, 0) if packed else signed
        if ordered:
            tensors["weight_g_idx"] = places.astype(np.int32)
        return Stored(tensors, meant)

    one = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False,
        "group_size": group if strategy == "group" else None, "actorder": "group" if ordered else None,
    }  # fmt: skip
    return Method(_compressed(kind, one), store, bits)


def _compressed(kind: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


def _tiled(weights: Array, down: int, across: int, dtype: Any) -> tuple[Array, Array, npt.NDArray[np.float64]]:
    """8-bit floats with a scale for each tile."""
    rows, columns = weights.shape
    high = np.pad(np.abs(weights).astype(np.float64), ((0, -rows % down), (0, -columns % across)))
    scales = (high.reshape(-(-rows // down), down, -(-columns // across), across).max((1, 3)) / 448).astype(dtype)
    each = np.repeat(np.repeat(scales.astype(np.float64), down, 0), across, 1)[:rows, :columns]
    made = (weights / each).astype(ml_dtypes.float8_e4m3fn)
    return made, scales, made.astype(np.float64) * each


def fp8(tile: tuple[int, int] | None = (128, 128), dtype: Any = np.float32) -> Method:
    def store(weights: Array) -> Stored:
        made, scales, meant = _tiled(weights, *(tile or weights.shape), dtype)
        return Stored({"weight": made, "weight_scale_inv": scales if tile else scales.reshape(())}, meant)

    about = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return Method(about | ({"weight_block_size": list(tile)} if tile else {}), store)


def fp8_compressed(strategy: str, tile: tuple[int, int] = (64, 32)) -> Method:
    def store(weights: Array) -> Stored:
        size = {"tensor": weights.shape, "channel": (1, weights.shape[1]), "block": tile}[strategy]
        made, scales, meant = _tiled(weights, *size, ml_dtypes.bfloat16)
        return Stored({"weight": made, "weight_scale": scales.reshape(-1) if strategy == "tensor" else scales}, meant)

    one = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    return Method(_compressed("float-quantized", one | {"block_structure": list(tile)}), store)


def mxfp4(weights: Array) -> Stored:
    """A stack [experts, rows, columns]: 4-bit floats with a power of two for each 32."""
    apart = weights.reshape(*weights.shape[:-1], -1, 32).astype(np.float64)
    powers = np.ceil(np.log2(np.maximum(np.abs(apart).max(-1) / 6, 2.0**-100))).astype(np.int64)
    levels = np.array([*E2M1, *(-level for level in E2M1)])
    codes = np.abs(apart[..., None] / (2.0 ** powers[..., None, None]) - levels).argmin(-1)
    meant = levels[codes] * 2.0 ** powers[..., None]
    blocks = (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)
    return Stored({"_blocks": blocks, "_scales": (powers + 127).astype(np.uint8)}, meant.reshape(weights.shape))


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
METHODS: dict[str, Method] = {
    "GPTQ 4 bits": gptq(4, 32, True),
    "GPTQ 4 bits, zeros": gptq(4, 64, False),
    "GPTQ 4 bits, zeros, format 2": gptq(4, 32, False, version="gptq_v2"),
    "GPTQ 4 bits, in order of activations": gptq(4, 32, False, ordered=True),
    "GPTQ 8 bits, in order of activations": gptq(8, 16, True, ordered=True),
    "GPTQ 8 bits, rows": gptq(8, -1, True),
    "GPTQ 8 bits, zeros, groups of 48": gptq(8, 48, False),
    "AWQ": awq(32),
    "AWQ, rows": awq(-1),
    "compressed-tensors 4 bits": compressed(4, "group"),
    "compressed-tensors 4 bits, zeros": compressed(4, "group", False),
    "compressed-tensors 4 bits, plain zeros": compressed(4, "group", False, plain_zeros=True),
    "compressed-tensors 4 bits, in order of activations": compressed(4, "group", ordered=True),
    "compressed-tensors 8 bits, rows, zeros": compressed(8, "channel", False),
    "compressed-tensors int8": compressed(8, "channel", kind="int-quantized"),
    "compressed-tensors int8, zeros": compressed(8, "tensor", False, kind="int-quantized"),
    "FP8": fp8((128, 128)),
    "FP8, small tiles": fp8((32, 48), ml_dtypes.bfloat16),
    "FP8, one scale": fp8(None),
    "compressed-tensors FP8": fp8_compressed("channel"),
    "compressed-tensors FP8, one scale": fp8_compressed("tensor"),
    "compressed-tensors FP8, tiles": fp8_compressed("block"),
}
