"""Shards with rounded matrices against the whole model in float: every matrix in its place, memory as promised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peerllm.engine.model import packed as kernel
from peerllm.engine.model.config import DTYPES, parse_config
from peerllm.engine.model.division import divide
from peerllm.engine.model.keeping import matrices
from peerllm.engine.model.packed import Packed
from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_shard import load_shard
from peerllm.errors import BadInputError, RefusedError
from tests.engine.architectures import FAMILIES, quiet, save, stage, tiny_model
from tests.engine.runs import in_slot
from tests.sizes import FULL

# Turned weights, biases, fused matrices, ties and scaled embeddings, experts, latent attention, recurrent layers.
SHARE = (
    "Llama",
    "Qwen2",
    "GPT-2",
    "Phi-3",
    "Gemma",
    "Mixtral",
    "DeepSeek-V3",
    "Qwen3-Next",
    "ModernBERT (decoder)",
    "Gemma 3n (text)",
    "Gemma 4 (experts)",
)
CHOSEN = [family for family in FAMILIES if FULL or family.name in SHARE]
IDS = torch.tensor([3, 5, 7, 11, 13, 17, 19, 23, 29])
FAR = 0.4  # of the logits' length: a matrix in a wrong place is farther off, rounding to 8 bits nearer


@pytest.fixture(autouse=True)
def _quiet():
    quiet()
    torch.set_num_threads(1)


def shards(directory, dtype, quantize, firsts=(0, 3)):
    found = inspect_model(directory, dtype, quantize)
    ends = [*firsts[1:], len(found.profile.layers)]
    specs = [stage(found, a, b - 1, 2, 32) for a, b in zip(firsts, ends, strict=True)]
    return found, [load_shard(replace(spec, quantize=found.quantize)) for spec in specs]


def logits(loaded, ids=IDS, slot=0):
    row = ids.numpy()
    for shard in loaded:
        row = shard.forward(row, [in_slot(slot, 0, len(ids), True)])
    return torch.from_numpy(row[0])


def packed(loaded):
    return sum(isinstance(module, Packed) for shard in loaded for module in shard._model.modules())


def distance(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("family", CHOSEN, ids=lambda family: family.name)
def test_rounded_models_say_nearly_the_same(family, tmp_path):
    model = save(tiny_model(family, 1.0, 0), tmp_path)
    with torch.inference_mode():
        want = model(IDS.unsqueeze(0), use_cache=False).logits[0, -1].float()
    found, loaded = shards(tmp_path, "auto", "int8")
    got = logits(loaded)
    assert packed(loaded), "something was packed"
    assert distance(got, want) < FAR
    assert sum(shard.weight_bytes for shard in loaded) <= sum(layer.memory_bytes for layer in found.profile.layers)
    assert all(0 < sum(shard.weights.values()) <= shard.weight_bytes for shard in loaded)
    torch.testing.assert_close(logits(loaded, slot=1), got)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    quiet()
    directory = tmp_path_factory.mktemp("llama")
    return save(tiny_model(next(f for f in FAMILIES if f.name == "Llama"), 1.0, 0), directory), directory


def test_float32_stays_as_it_is(llama):
    model, directory = llama
    _, loaded = shards(directory, "float32", "")
    with torch.inference_mode():
        want = model(IDS.unsqueeze(0), use_cache=False).logits[0, -1].float()
    assert not packed(loaded)
    torch.testing.assert_close(logits(loaded), want, rtol=0, atol=1e-4)


def test_parts_and_order_of_arrival_make_no_difference(llama, monkeypatch):
    _, directory = llama
    whole = logits(shards(directory, "auto", "int8")[1])
    monkeypatch.setattr(kernel, "PART_WEIGHTS", 700)
    cut = shards(directory, "auto", "int8")[1]
    assert max(len(m._parts) for s in cut for m in s._model.modules() if isinstance(m, Packed)) > 1
    torch.testing.assert_close(logits(cut), whole)
    backwards = inspect_model(directory, "auto", "int8")
    backwards = replace(backwards, tensors=tuple(tuple(reversed(layer)) for layer in backwards.tensors))
    last = len(backwards.profile.layers) - 1
    loaded = [load_shard(replace(stage(backwards, 0, last, 2, 32), quantize="int8"))]
    torch.testing.assert_close(logits(loaded), whole)


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_bfloat16_is_plain_torch_unless_it_is_rounded(llama, tmp_path, quantize):
    model, _ = llama
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    model.to(torch.float32)
    found, loaded = shards(tmp_path, "auto", quantize)
    assert found.dtype == "bfloat16"
    assert bool(packed(loaded)) == (quantize == "int8")
    assert (found.profile.layers[0].memory_bytes == 0) == (quantize == "int8"), "the embedding stays in its file"
    assert sum(shard.weight_bytes for shard in loaded) == sum(layer.memory_bytes for layer in found.profile.layers)
    with torch.inference_mode():
        want = model(IDS.unsqueeze(0), use_cache=False).logits[0, -1].float()
    assert distance(logits(loaded), want) < FAR


def test_more_than_was_promised_is_refused_before_it_is_read(llama):
    _, directory = llama
    found = inspect_model(directory, "auto", "int4")
    spec = replace(stage(found, 1, 2, 2, 32), quantize="int4")
    needed = sum(layer.memory_bytes for layer in found.profile.layers[1:3])
    with pytest.raises(RefusedError, match="promised"):
        load_shard(replace(spec, limit_bytes=needed - 1))
    with pytest.raises(BadInputError, match="int8"):
        inspect_model(directory, "auto", "int2")


def test_matrices_that_are_asked_for_their_weights_stay(llama):
    _, directory = llama
    division = divide(parse_config((directory / "config.json").read_text()), DTYPES["float32"])
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in matrices(division)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head"}, (
        "48 is no block's width"
    )
    kind = type(division.blocks[0].mlp)
    before = kind.forward
    try:
        kind.forward = lambda self, x: x + self.up_proj.weight.sum()
        assert set(matrices(division)) == {"lm_head.weight"}
    finally:
        kind.forward = before
