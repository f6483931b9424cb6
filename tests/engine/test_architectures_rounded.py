"""Graphs with rounded weights: every cut says the same, and what they say is near what the weights say in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerllm.engine.graph.experts import Stacks
from peerllm.engine.graph.matrix_product import Part
from peerllm.engine.weights.rounding import block_of, rounded
from peerllm.types import BITS
from tests.engine.architectures import (
    EXPERTS,
    FAMILIES,
    LAYERS,
    VOCABULARY,
    Cut,
    Family,
    Floats,
    cuts,
    inspect,
    likeness,
    save,
    tiny_model,
    walked,
)
from tests.engine.kernels.test_rounding import restored
from tests.sizes import FULL

WIDER = {"hidden_size": 64, "intermediate_size": 128, "n_inner": 128, "head_dim": 16}  # for blocks of 32 and of 128
EXPERTS_TOO = {**EXPERTS, "moe_intermediate_size": 64}
SHARED = {"shared_expert_intermediate_size": 64, "shared_intermediate_size": 64}
DENSE = ("Llama", "Qwen2", "Gemma 2", "GPT-2", "Phi", "Phi-3", "GPT-NeoX", "Falcon", "OLMo 2")
GATED = ("LFM2", "Qwen3.5 (text)")  # roundings of numbers that are multiplied with each other
MIXED = ("Mixtral", "Qwen2-MoE", "Granite-MoE (shared)", "gpt-oss", "DeepSeek-V3", "Granite hybrid")
EXACT = (  # are never rounded
    "mlp.gate", "router", "router.layer", "shared_expert_gate", "in_proj_a", "in_proj_b", "kv_b_proj",
)  # fmt: skip
STEPS = "mamba.in_proj"  # of its rows the last, one for each head, are never rounded
IDS = np.random.default_rng(1).integers(3, VOCABULARY, 24)
WHOLE: Cut = ((0, LAYERS - 1),)

pytestmark = pytest.mark.usefixtures("calm")


def wider(name: str) -> Family:
    family = next(family for family in FAMILIES if family.name == name)
    more = {**WIDER, **(EXPERTS_TOO | SHARED if name in MIXED else {})}
    more |= {"mamba_d_head": 32} if name == "Granite hybrid" else {}
    return replace(family, config={**family.config, **{k: v for k, v in more.items() if k not in family.without}})


def logits(directory: Path, quantize: str, cut: Cut = WHOLE) -> Floats:
    """[n, vocabulary], of one token at a time."""
    return walked(inspect(directory, quantize=quantize), cut, IDS)


def restoring(patch: pytest.MonkeyPatch, bits: int) -> None:
    """Graphs in float32 are made of the weights that rounded ones stand for."""

    def meant(rows: Floats) -> Floats:
        block = block_of(rows.shape[1])
        assert block is not None
        return np.asarray(restored(*rounded(rows, bits, block), bits))

    one, expert = Part.floats, Stacks.floats

    def part(self: Part, *about: Any) -> Floats:
        rows = one(self, *about)
        exact = self.tensor.endswith(EXACT) or (self.tensor.endswith(STEPS) and self.count < 8)
        return rows if exact or block_of(rows.shape[1]) is None else meant(rows)

    patch.setattr(Stacks, "floats", lambda *about: meant(expert(*about)))
    patch.setattr(Part, "floats", part)


@pytest.mark.parametrize("quantize", BITS)
@pytest.mark.parametrize("name", [*DENSE, *GATED, *MIXED])
def test_rounded_graphs_say_what_their_weights_stand_for(name: str, quantize: str, tmp_path: Path) -> None:
    save(tiny_model(wider(name), 1.0, 0), tmp_path)
    whole, exact = logits(tmp_path, quantize), logits(tmp_path, "none")
    for cut in cuts(LAYERS, 2)[:: 1 if FULL else 3]:
        np.testing.assert_array_equal(logits(tmp_path, quantize, cut), whole)
    with pytest.MonkeyPatch.context() as patch:
        restoring(patch, BITS[quantize])
        meant = logits(tmp_path, "none")
    least = 0.95 if name in MIXED else 0.99 if name in GATED else 0.999
    assert likeness(whole, meant) > least, "but for inputs, which are rounded as well"
    assert likeness(whole, exact) > {"int8": 0.97, "int4": 0.7}[quantize]
    skipped = logits(tmp_path, quantize, ((0, LAYERS - 3), (LAYERS - 1, LAYERS - 1)))
    assert likeness(skipped, meant) < 0.94, "a control: without its last block"
