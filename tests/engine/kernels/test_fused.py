"""Fused blocks say what the same rounded matrices say one by one; blocks that compute something else are not fused."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers.models.llama import modeling_llama

from peerllm.engine import assembly
from peerllm.engine.base import Segment
from peerllm.engine.config import parse_config
from peerllm.engine.division import divide
from peerllm.engine.inspect import inspect_model
from peerllm.engine.kernels.fused import KEPT_TOKENS, FusedBlock
from peerllm.engine.kernels.fusing import Fusion
from peerllm.engine.kernels.matrices import matrices
from peerllm.engine.kernels.trial import fusible
from peerllm.engine.shard import load_shard
from peerllm.errors import EngineError, RefusedError
from tests.engine.architectures import FAMILIES, FULL, quiet, save, stage, tiny_model

WIDE = 64  # rows of the down projection that a block of weights divides
# Biases; norms of heads; scaled residuals; offsets, soft caps and windows; joined matrices; norms after; neighbours
# turned, and not all of a head; layers without rotation.
SHARE = ("Llama", "Qwen2", "Qwen3", "Granite", "Gemma 2", "Phi-3", "OLMo 2", "GLM-4", "SmolLM3")
WHOLLY = (
    *SHARE, "Mistral", "Ministral", "Gemma", "Gemma 3 (text)", "OLMo 3", "EXAONE 4", "Helium", "Seed-OSS", "CWM",
    "InternLM3", "IQuest-Coder", "ERNIE 4.5", "GLM",
)  # fmt: skip
PARTLY = ("Qwen3-MoE", "GLM-4-MoE", "dots.llm1", "ERNIE 4.5-MoE", "EXAONE-MoE", "Hunyuan 3")  # their dense layers
CHOSEN = [family for family in FAMILIES if family.name in (WHOLLY + PARTLY if FULL else (*SHARE, "Qwen3-MoE"))]
NEAR = {torch.float32: 0.02, torch.bfloat16: 0.1}  # of the logits' length


@pytest.fixture(autouse=True)
def _quiet():
    quiet()
    torch.set_num_threads(1)


def wide(family):
    return replace(family, config={**family.config, "intermediate_size": WIDE})


def written(name, directory, dtype=torch.float32):
    family = next(family for family in FAMILIES if family.name == name)
    save(tiny_model(wide(family), 1.0, 0), directory).to(dtype).save_pretrained(directory)
    return directory


def shards(directory, quantize="int8", firsts=(0, 3), reverse=False):
    found = inspect_model(directory, "auto", quantize)
    if reverse:
        found = replace(found, tensors=tuple(tuple(reversed(layer)) for layer in found.tensors))
    ends = [*firsts[1:], len(found.profile.layers)]
    specs = [stage(found, a, b - 1, 3, 64) for a, b in zip(firsts, ends, strict=True)]
    return found, [load_shard(replace(spec, quantize=quantize)) for spec in specs]


def plain(monkeypatch: pytest.MonkeyPatch, make: Callable[[], object]):
    with monkeypatch.context() as patched:
        patched.setattr(assembly, "fusible", lambda *_: {})
        return make()


def fused(loaded):
    return sum(isinstance(block.forward, FusedBlock) for shard in loaded for block in shard.blocks)


def said(loaded):
    """Logits of two chunks, of steps of three sequences packed in one row, and of a row too long for a kept room."""
    told = []

    def go(ids, segments):
        row = ids
        for shard in loaded:
            row = shard.forward(row, segments)
        told.append(row)

    go(torch.arange(9) + 3, [Segment(0, 0, 5, True), Segment(2, 0, 4, True)])
    for step in range(3):
        go(torch.tensor([7 + step, 50]), [Segment(0, 5 + step, 1, True), Segment(2, 4 + step, 1, True)])
    go(torch.tensor([*range(KEPT_TOKENS + 4), 9]), [Segment(1, 0, KEPT_TOKENS + 4, True), Segment(0, 8, 1, True)])
    return torch.cat(told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", CHOSEN, ids=lambda family: family.name)
def test_fused_blocks_say_what_their_matrices_say(family, dtype, tmp_path, monkeypatch):
    if dtype is torch.bfloat16 and family.name in PARTLY:
        pytest.skip("a token that is sent to another expert is another token")
    written(family.name, tmp_path, dtype)
    found, loaded = shards(tmp_path)
    blocks = len(found.profile.layers) - 2
    assert fused(loaded) == blocks if family.name in WHOLLY else 0 < fused(loaded) < blocks
    single = plain(monkeypatch, lambda: shards(tmp_path)[1])
    assert not fused(single)
    got, want = said(loaded), said(single)
    assert float((got - want).norm() / want.norm()) < NEAR[dtype]
    assert sum(shard.weight_bytes for shard in loaded) <= sum(layer.memory_bytes for layer in found.profile.layers)


def test_four_bits_too(tmp_path, monkeypatch):
    written("Llama", tmp_path)
    loaded = shards(tmp_path, "int4")[1]
    want = said(plain(monkeypatch, lambda: shards(tmp_path, "int4")[1]))
    assert fused(loaded) == 4
    assert float((said(loaded) - want).norm() / want.norm()) < NEAR[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_where_a_model_is_cut_makes_no_difference(dtype, tmp_path):
    written("Qwen3", tmp_path, dtype)
    uncut = shards(tmp_path, firsts=(0,))[1]
    assert fused(uncut) == 4
    whole = said(uncut)
    for firsts in ((0, 2), (0, 3), (0, 1, 4), (0, 5)):
        assert torch.equal(said(shards(tmp_path, firsts=firsts)[1]), whole)


def test_order_of_arrival_makes_no_difference(tmp_path):
    written("Qwen2", tmp_path)
    backwards = shards(tmp_path, reverse=True)[1]
    assert fused(backwards) == 4
    assert torch.equal(said(backwards), said(shards(tmp_path)[1]))


def test_what_was_handed_on_is_not_overwritten(tmp_path):
    written("Llama", tmp_path)
    first = shards(tmp_path)[1][0]
    assert fused([first]) == 2
    handed = first.forward(torch.tensor([5]), [Segment(0, 0, 1, False)])
    kept = handed.clone()
    first.forward(torch.tensor([6]), [Segment(1, 0, 1, False)])
    assert torch.equal(handed, kept)


def test_a_missing_tensor_is_named(tmp_path):
    written("Qwen2", tmp_path)
    found = inspect_model(tmp_path, "auto", "int8")
    spec = replace(stage(found, 0, 2, 3, 64), quantize="int8")
    for what in ("matrix", "bias"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Fusion, what, lambda self, role, tensor: None)
            with pytest.raises(EngineError, match="was not loaded"):
                load_shard(spec)


def test_what_was_not_promised_is_refused_before_it_is_tried(tmp_path, monkeypatch):
    written("Llama", tmp_path)
    found = inspect_model(tmp_path, "auto", "int8")
    monkeypatch.setattr(assembly, "fusible", lambda *_: pytest.fail("tried"))
    with pytest.raises(RefusedError):
        load_shard(replace(stage(found, 0, 2, 3, 64), quantize="int8", limit_bytes=1))


def test_giants_are_not_tried(tmp_path):
    written("Llama", tmp_path)
    assert fused_blocks(tmp_path), "but for their size they would be"
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_size": 1 << 23}
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fused_blocks(tmp_path) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 64 << 10, "KiB"


def fused_blocks(directory):
    division = divide(parse_config((directory / "config.json").read_text()), torch.float32)
    return sorted(fusible(division, range(len(division.blocks)), matrices(division)))


def clipped(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=100) * self.up_proj(x))


def added(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


def other(self, x):
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def failing(self, x):
    raise RuntimeError("not here")


@pytest.mark.parametrize("forward", [clipped, added, other, failing])
def test_blocks_that_compute_something_else_are_not_fused(forward, tmp_path, monkeypatch):
    written("Llama", tmp_path)
    assert fused_blocks(tmp_path) == [0, 1, 2, 3]
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    assert fused_blocks(tmp_path) == []


def test_blocks_that_attend_otherwise_are_not_fused(tmp_path, monkeypatch):
    written("Llama", tmp_path)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos))
    assert fused_blocks(tmp_path) == []


def test_blocks_that_scale_by_position_are_not_fused(tmp_path):
    assert fused_blocks(written("Ministral 3", tmp_path)) == []


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "GPT-2", "StableLM", "Hunyuan (dense)", "DiffLlama"])
def test_blocks_of_other_parts_are_left_alone(name, tmp_path):
    written(name, tmp_path)
    assert fused_blocks(tmp_path) == []
