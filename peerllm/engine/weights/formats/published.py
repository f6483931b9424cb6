"""What quantization_config says about checkpoints that are published quantized, as forms of their matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from peerllm.engine.weights.formats.awq import AWQForm
from peerllm.engine.weights.formats.coded_rows import WeightForm
from peerllm.engine.weights.formats.compressed_tensors import CompressedForm
from peerllm.engine.weights.formats.fp8 import FP8Form
from peerllm.engine.weights.formats.gptq import GPTQForm
from peerllm.engine.weights.formats.grouped_form import SMALLEST, block_in
from peerllm.engine.weights.formats.mxfp4 import MXFP4Form
from peerllm.errors import ModelError

About = Mapping[str, Any]
INSTEAD = "take the model's GGUF, GPTQ, AWQ, FP8 or 16-bit files instead"
MOST_SHOWN = 40  # characters of a value in a message
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
HIGH_BITS = (4, 8)
COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
DECISIVE = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder")
MAX_TILE = 1 << 16
USUALLY_FLOATS = ("embed_tokens", "wte", "lm_head", "gate", "router", "shared_expert_gate")


def published_forms(about: About, config: Mapping[str, Any]) -> Callable[[str], WeightForm | None]:
    """The forms of matrices by their plain names; ModelError names what is not read and what to take instead."""
    method = about.get("quant_method")
    readers = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8, "fbgemm_fp8": _fp8}
    if method == "mxfp4":
        return _mxfp4(config)
    if method not in readers:
        raise _refused(f"by {_shown(method)}")
    form = readers[method](about, about.get("found") or {}, config)
    floats = frozenset(map(str, about["floats"])) if isinstance(about.get("floats"), list) else None

    def form_of(name: str) -> WeightForm | None:
        if not name.endswith(".weight"):
            return None
        layer = name.removesuffix(".weight")
        usual = layer.rpartition(".")[2] in USUALLY_FLOATS
        return None if (usual if floats is None else layer in floats) else form

    return form_of


def _shown(value: Any) -> str:
    return repr(value)[:MOST_SHOWN]


def _refused(how: str) -> ModelError:
    return ModelError(f"the checkpoint is quantized {how}, which peerllm does not read; {INSTEAD}")


def _bits(value: Any, method: str) -> int:
    if value not in HIGH_BITS or type(value) is not int:
        raise _refused(f"by {method} to {_shown(value)} bits")
    return int(value)


def _groups(size: Any, config: Mapping[str, Any], method: str) -> tuple[int | None, int]:
    """How many columns share a scale (None: all), and the blocks for products."""
    if type(size) is not int or not (size == -1 or 0 < size <= MAX_TILE):
        raise _refused(f"by {method} in groups of {_shown(size)}")
    group = None if size == -1 else size
    heads, hidden = (config.get(key) for key in ("num_attention_heads", "hidden_size"))
    sides = [config.get(key) for key in WIDTHS]
    if type(heads) is int and heads > 0 and type(hidden) is int:
        width = config.get("head_dim")
        sides.append(heads * (width if type(width) is int else hidden // heads))
    block = block_in(group, math.gcd(*(side for side in sides if type(side) is int and side > 0)))
    if not block:
        raise _refused(f"by {method} in groups of {_shown(size)}, or rows, that no block of {SMALLEST} divides")
    return group, block


def _gptq(about: About, found: About, config: Mapping[str, Any]) -> WeightForm:
    kind = about.get("checkpoint_format") or about.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2") or about.get("is_marlin_format"):
        raise _refused(f"by GPTQ and stored as {_shown(kind)}")
    if about.get("pack_dtype", "int32") != "int32":
        raise _refused(f"by GPTQ and packed into {_shown(about.get('pack_dtype'))}")
    rules = about.get("dynamic") or {}
    if not isinstance(rules, dict) or any(rule and not str(name).startswith("-:") for name, rule in rules.items()):
        raise _refused('by GPTQ with different rules for some layers ("dynamic")')
    bits = _bits(about.get("bits"), "GPTQ")
    group, block = _groups(about.get("group_size", -1), config, "GPTQ")
    symmetric, ordered = bool(about.get("sym", True)), bool(about.get("desc_act", False))
    return GPTQForm(bits, group, block, not symmetric, ordered and group is not None, int(kind == "gptq"))


def _awq(about: About, found: About, config: Mapping[str, Any]) -> WeightForm:
    version = about.get("version") or "gemm"
    if str(version).lower() != "gemm":
        raise _refused(f"by AWQ and stored as {_shown(version)}")
    if not about.get("zero_point", True) or found.get("scaled_activations"):
        raise _refused(f"by AWQ {'with scaled activations' if found.get('scaled_activations') else 'without zeros'}")
    bits = about.get("bits", about.get("w_bit"))
    if bits != 4:
        raise _refused(f"by AWQ to {_shown(bits)} bits")
    group, block = _groups(about.get("group_size", about.get("q_group_size", -1)), config, "AWQ")
    return AWQForm(4, group, block, zeros=True)


def _compressed(about: About, found: About, config: Mapping[str, Any]) -> WeightForm:
    name, groups = "compressed-tensors", about.get("config_groups")
    parts = list(groups.values()) if isinstance(groups, dict) else []
    given = [part.get("weights") for part in parts if isinstance(part, dict)]
    weights = [one for one in given if isinstance(one, dict)]
    if not parts or len(weights) < len(parts):
        raise _refused(f"by {name} without saying how weights are stored")
    one, formats = weights[0], {str(part.get("format") or about.get("format")) for part in parts}
    if len(formats) > 1 or any(other.get(key) != one.get(key) for other in weights for key in DECISIVE):
        raise _refused(f"by {name} in different ways for some layers")
    kind = formats.pop()
    if kind not in COMPRESSED:
        raise _refused(f"by {name} as {_shown(kind)}")
    if about.get("transform_config") or (about.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refused(f"by {name} with transforms or sparsity")
    strategy = str(one.get("strategy") or ("group" if one.get("group_size") else "tensor"))
    if one.get("type", "int") == "float":
        return _compressed_floats(one, kind, strategy, found)
    if strategy not in ("tensor", "channel", "group"):
        raise _refused(f"by {name} with scales by {_shown(strategy)}")
    bits, words, single = _bits(one.get("num_bits"), name), kind == "pack-quantized", strategy == "tensor"
    if bits != 8 and not words:
        raise _refused(f"by {name} to {bits} bits as {_shown(kind)}")
    group, block = _groups(one.get("group_size") if strategy == "group" else -1, config, name)
    ordered = bool(found.get("weight_g_idx")) and group is not None
    packed_zeros = bool(found.get("packed_zeros", words)) and not single
    return CompressedForm(bits, group, block, not one.get("symmetric", True), ordered, words, packed_zeros, single)


def _compressed_floats(one: About, kind: str, strategy: str, found: About) -> WeightForm:
    if one.get("num_bits") != 8 or kind == "pack-quantized":
        raise _refused(f"by compressed-tensors to floats of {_shown(one.get('num_bits'))} bits")
    if strategy == "block":
        return FP8Form("weight_scale", _tile(one.get("block_structure")))
    if strategy not in ("tensor", "channel"):
        raise _refused(f"by compressed-tensors to floats with scales by {_shown(strategy)}")
    single = strategy == "tensor"
    return FP8Form("weight_scale", (None if single else 1, None), _sides(found, 1 if single else 2))


def _fp8(about: About, found: About, config: Mapping[str, Any]) -> WeightForm:
    if about.get("fmt", "e4m3") not in ("e4m3", "e5m2", "float8_e4m3fn"):
        raise _refused(f"to 8-bit floats of kind {_shown(about.get('fmt'))}")
    scale = "weight_scale" if found.get("scale") == "weight_scale" else "weight_scale_inv"
    size = about.get("weight_block_size")
    if about.get("quant_method") == "fbgemm_fp8":
        return FP8Form("weight_scale", (1, None), _sides(found, 2))
    if size is None:
        return FP8Form(scale, (None, None), _sides(found, 0))
    return FP8Form(scale, _tile(size))


def _tile(size: Any) -> tuple[int, int]:
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n <= MAX_TILE for n in size):
        raise _refused(f"to 8-bit floats in tiles of {_shown(size)}")
    return size[0], size[1]


def _sides(found: About, usual: int) -> int:
    sides = found.get("scale_sides", usual)
    return sides if sides in (0, 1, 2) else usual


def _mxfp4(config: Mapping[str, Any]) -> Callable[[str], WeightForm | None]:
    count = config.get("num_local_experts")
    if config.get("model_type") != "gpt_oss" or type(count) is not int or count < 1:
        raise _refused("by 'mxfp4' but is not a gpt-oss model")
    form = MXFP4Form(count)
    return lambda name: form if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) else None
