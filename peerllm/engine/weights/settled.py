"""What only a published checkpoint's files say about its quantization, written into its configuration.

quantization_config names layers that stay in floats by patterns that every tool reads in its own way, and often not at
all: the files know. From then on the configuration alone says how each matrix is stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peerllm.engine.messages import TensorAt
from peerllm.stored_types import PLAIN_FLOATS

SCALES = ("weight_scale_inv", "weight_scale")
EXPERT = re.compile(r"\.experts\.[0-9]+\.")


def settled(config: Mapping[str, Any], tensors: Iterable[tuple[str, TensorAt]]) -> dict[str, Any]:
    """`config` with what the files of a published quantized checkpoint say; `tensors`: by their plain names."""
    about = config["quantization_config"]
    floats, found = set[str](), dict[str, Any]()
    for name, tensor in tensors:
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and len(tensor.shape) > 1 and tensor.dtype in PLAIN_FLOATS:
            floats.add(EXPERT.sub(".experts.0.", layer))
        elif kind in SCALES:
            found |= {"scale": kind, "scale_sides": len(tensor.shape)}
        elif kind == "weight_zero_point":
            found["packed_zeros"] = tensor.dtype == "I32"
        elif kind == "weight_g_idx":
            found[kind] = True
        elif name.endswith("act.scales"):
            found["scaled_activations"] = True
    return {**config, "quantization_config": {**about, "floats": sorted(floats), "found": found}}
