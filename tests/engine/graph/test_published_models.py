"""Models that are published quantized: computed as their weights in float32 are, and near that from whole numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from peerllm.engine.backends import Backends
from peerllm.engine.graph.graph_shard import GraphShard
from peerllm.engine.messages import Inspect, Inspected
from tests.engine.architectures import (
    EXPERTS,
    FAMILIES,
    LAYERS,
    PROMPT,
    TOLERANCE,
    VOCABULARY,
    WINDOWS,
    Cut,
    Family,
    Floats,
    cuts,
    difference,
    generate,
    load,
    reference,
    tiny_model,
)
from tests.engine.quantising import quantise
from tests.engine.runs import in_slot
from tests.engine.weights.packers import METHODS

WIDER = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_attention_heads": 4}
ROUTED = {**EXPERTS, "moe_intermediate_size": 96}
TINY = {
    "Llama": replace(FAMILIES[0], config=WIDER),
    "Qwen3-MoE": Family("Qwen3-MoE", "qwen3_moe", {**WIDER, **ROUTED}),
    "gpt-oss": Family("gpt-oss", "gpt_oss", {**WIDER, **ROUTED, **WINDOWS}),
}
IDS = np.random.default_rng(1).integers(3, VOCABULARY, 24)
WHOLE: Cut = ((0, LAYERS - 1),)

pytestmark = pytest.mark.usefixtures("calm")


def inspect(directory: Path, dtype: str = "auto") -> Inspected:
    return Backends().inspect(Inspect(1, str(directory), dtype, "auto"))


def made(family: str, method: str, directory: Path) -> tuple[Path, Any]:
    """A quantized model and transformers' float32 model of the same weights."""
    model = tiny_model(TINY[family], 1.0, 0)
    place = directory / "quantized"
    model.save_pretrained(place)
    quantise(place, method, directory / "floats")
    return place, type(model).from_pretrained(directory / "floats", dtype="float32").eval()


def logits(inspected: Inspected, cut: Cut = WHOLE) -> Floats:
    """[n, vocabulary], of one token at a time."""
    shards = load(inspected, cut)
    assert all(isinstance(shard, GraphShard) for shard in shards)
    rows = []
    for position, token in enumerate(IDS):
        carried: npt.NDArray[Any] = np.array([token])
        for shard in shards:
            carried = shard.forward(carried, [in_slot(0, position, 1, True)])
        rows.append(carried[0].copy())
    return np.array(rows)


def likeness(some: Floats, others: Floats) -> float:
    """The median over positions of the cosine of their logits: rounding sends some tokens to another expert."""
    lengths = np.linalg.norm(some, axis=1) * np.linalg.norm(others, axis=1)
    return float(np.median((some * others).sum(1) / lengths))


CASES = [(family, method) for family in ("Llama", "Qwen3-MoE") for method in METHODS] + [("gpt-oss", "MXFP4")]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_tokens_are_those_of_the_weights_in_float32(family: str, method: str, tmp_path: Path) -> None:
    place, model = made(family, method, tmp_path)
    prompt = IDS[:PROMPT]
    tokens, wanted = reference(model, prompt)
    exact = inspect(place, "float32")
    assert (exact.dtype, exact.quantize) == ("float32", "")
    for cut in (WHOLE, *cuts(LAYERS, 2)[1:3]):
        said, found = generate([shard.forward for shard in load(exact, cut)], prompt, (4, PROMPT - 4))
        assert said == tokens
        assert difference(found, wanted) <= TOLERANCE
    stored = inspect(place)
    assert (stored.dtype, stored.quantize) == ("float32", "stored")
    meant, near = logits(exact), logits(stored)
    assert likeness(near, meant) > (0.95 if family != "Llama" else 0.998 if "FP8" in method else 0.999)
    np.testing.assert_array_equal(logits(stored, cuts(LAYERS, 2)[2]), near)
    skipped = logits(stored, ((0, LAYERS - 3), (LAYERS - 1, LAYERS - 1)))
    assert likeness(skipped, meant) < 0.94, "a control: without its last block"
