"""Models that are published quantized: computed as their weights in float32 are, and near that from whole numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerllm.engine.backends import Backends
from peerllm.engine.graph.load import ShardForm
from peerllm.engine.messages import Inspect, Inspected, TimeLayers
from peerllm.engine.weights.checkpoint import mapped, read_tensors
from peerllm.errors import ModelError
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
    likeness,
    load,
    reference,
    tiny_model,
    walked,
)
from tests.engine.quantising import quantise, write
from tests.engine.weights.packers import METHODS, Array

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
    return walked(inspected, cut, IDS)


OFTEN = {  # the others are marked slow
    ("Llama", "GPTQ 4 bits, in order of activations"), ("Llama", "GPTQ 8 bits, zeros, groups of 48"), ("Llama", "AWQ"),
    ("Llama", "compressed-tensors 4 bits, zeros"), ("Llama", "FP8, small tiles"), ("Qwen3-MoE", "AWQ"),
    ("Qwen3-MoE", "GPTQ 4 bits"), ("Qwen3-MoE", "compressed-tensors FP8"), ("gpt-oss", "MXFP4"),
}  # fmt: skip
CASES = [*((family, method) for family in ("Llama", "Qwen3-MoE") for method in METHODS), ("gpt-oss", "MXFP4")]


@pytest.mark.parametrize(
    ("family", "method"), [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.slow) for case in CASES]
)
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


def damaged(place: Path, change: Callable[[dict[str, Array]], None]) -> None:
    """Rewrite a model's tensors."""
    tensors = {name: np.array(mapped(tensor)) for name, tensor in read_tensors(place).items()}
    change(tensors)
    write(place, tensors, json.loads((place / "config.json").read_text()))


@pytest.mark.parametrize(
    ("method", "kind"),
    [("GPTQ 4 bits, in order of activations", kind) for kind in ("qweight", "qzeros", "scales", "g_idx")]
    + [("AWQ", "qzeros"), ("compressed-tensors 4 bits, zeros", "weight_zero_point"), ("FP8", "weight_scale_inv")],
)
def test_a_missing_or_misshapen_tensor_is_seen_before_weights_are_read(method: str, kind: str, tmp_path: Path) -> None:
    place, _ = made("Llama", method, tmp_path)
    name = f"model.layers.2.mlp.down_proj.{kind}"
    damaged(place, lambda tensors: tensors.update({name: tensors[name].reshape(-1)[1:]}))
    with pytest.raises(ModelError, match=rf"layers\.2\.mlp\.down_proj\.{kind} has shape"):
        inspect(place)
    damaged(place, lambda tensors: tensors.pop(name) is None)
    with pytest.raises(ModelError, match=rf"layers\.2\.mlp\.down_proj\.{kind} is missing"):
        inspect(place)


def test_an_expert_that_is_not_whole_is_seen(tmp_path: Path) -> None:
    place, _ = made("Qwen3-MoE", "GPTQ 4 bits", tmp_path)
    damaged(place, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.qzeros") is None)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.3\.up_proj\.qzeros is missing"):
        inspect(place)


def test_tensors_of_a_strange_type_are_refused(tmp_path: Path) -> None:
    place, _ = made("Llama", "GPTQ 4 bits", tmp_path)
    name = "model.layers.2.self_attn.o_proj.scales"
    damaged(place, lambda tensors: tensors.update({name: tensors[name].astype(np.int32)}))
    with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.o_proj\.scales is int32 .* needs float"):
        load(inspect(place), WHOLE)


def test_each_layer_has_the_tensors_it_needs_and_no_others(tmp_path: Path) -> None:
    place, _ = made("Qwen3-MoE", "GPTQ 4 bits", tmp_path)
    named = [{tensor.name for tensor in layer} for layer in inspect(place).tensors]
    there = {name for name in read_tensors(place) if not name.endswith("g_idx")}
    assert set.union(*named) == there
    assert sum(map(len, named)) == len(there)


def test_a_head_may_be_quantized_and_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _ = made("Llama", "GPTQ 4 bits", tmp_path)
    floats = logits(inspect(place, "float32"))
    drawn = np.random.default_rng(5).standard_normal((VOCABULARY + 3, 64)) / 8
    stored = METHODS["GPTQ 4 bits, zeros"].store(drawn)
    assert stored.tensors["qweight"].shape == (8, 104)

    def change(tensors: dict[str, Array]) -> None:
        del tensors["lm_head.weight"]
        tensors |= {f"lm_head.{kind}": array for kind, array in stored.tensors.items()}
        embedding = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = np.concatenate([embedding, embedding[:3]])
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY + 3, "lm_head": True}))

    place, _ = made("Llama", "GPTQ 4 bits, zeros", tmp_path / "zeros")
    damaged(place, change)
    whole = logits(inspect(place))
    assert whole.shape == (len(IDS), VOCABULARY + 3) and floats.shape == (len(IDS), VOCABULARY)
    monkeypatch.setattr(ShardForm, "graph_bytes", 3000)
    np.testing.assert_allclose(logits(inspect(place)), whole, atol=1e-5)
    hidden = logits(inspect(place, "float32"))
    assert likeness(whole, hidden) > 0.999


@pytest.mark.parametrize("method", ["GPTQ 4 bits, in order of activations", "AWQ", "FP8", "compressed-tensors int8"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3-MoE"])
def test_layers_are_timed_without_their_files(family: str, method: str, tmp_path: Path) -> None:
    place, _ = made(family, method, tmp_path)
    inspected = inspect(place)
    message = TimeLayers(1, inspected.config, "float32", 1 << 30, inspected.quantize)
    timed = Backends().time_layers(message, lambda: None)
    assert not timed.skipped
    assert {layer.kind for layer in inspected.profile.layers} <= set(timed.layer_ms)


def test_the_size_of_a_layer_follows_its_form(tmp_path: Path) -> None:
    sizes = {}
    for method in ("GPTQ 4 bits", "GPTQ 8 bits, rows", "FP8"):
        place, _ = made("Qwen3-MoE", method, tmp_path / method)
        sizes[method] = inspect(place).profile.layers[1].memory_bytes
    assert sizes["GPTQ 4 bits"] < sizes["GPTQ 8 bits, rows"]
    place, _ = made("Qwen3-MoE", "GPTQ 4 bits", tmp_path / "again")
    rounded = Backends().inspect(Inspect(1, str(place), "auto", "int8"))
    assert rounded.quantize == "int8"
    assert rounded.profile.layers[1].memory_bytes > sizes["GPTQ 4 bits"]


def test_what_is_not_read_says_what_to_take_instead(tmp_path: Path) -> None:
    place, _ = made("Llama", "GPTQ 4 bits", tmp_path)
    config = json.loads((place / "config.json").read_text())
    for change, why in (
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "'bitsandbytes', which"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "to 3 bits, which"),
        ({"model_type": "bloom"}, "not in the graph engine's table; quantized checkpoints of that kind"),
    ):
        (place / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=why) as refused:
            inspect(place)
        assert "\n" not in str(refused.value)
