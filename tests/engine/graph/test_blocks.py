"""Layers that keep convolutions, recurrent states or latents: batches, chunks, what they keep; experts in stacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peerllm.engine.graph.describe import describe
from peerllm.engine.weights.checkpoint import read_model
from peerllm.transport.frames.token_run import TokenRun
from tests.engine.graph.variants import LAYERS, SLOTS, VARIANTS, Made, load, make
from tests.engine.runs import in_slot

RECURRENT = [("lfm2", 0), ("qwen3_5_text", 0), ("qwen3_5_text", 2), ("granitemoehybrid", 1)]
LENGTHS = (40, 77, 13)  # of the prompts

pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Made]:
    return cache(lambda name, number: make(name, number, VARIANTS[name][number], tmp_path_factory.mktemp("model")))


def forward(model: Made, ids: Any, runs: Sequence[TokenRun]) -> Any:
    for shard in model.shards:
        ids = shard.forward(ids, runs)
    return ids.copy()


def read(model: Made, pieces: int) -> list[Any]:
    """The logits after each slot's prompt, which is read in so many pieces."""
    out = []
    for slot, length in enumerate(LENGTHS):
        for shard in model.shards:
            shard.release(slot)
        for part in np.array_split(np.arange(length), pieces):
            last = forward(model, model.ids[slot, part], [in_slot(slot, int(part[0]), len(part), True)])
        out.append(last)
    return out


@pytest.mark.parametrize(("name", "number"), RECURRENT)
def test_prompts_in_chunks_equal_whole_ones_in_every_bit(
    name: str, number: int, made: Callable[[str, int], Made]
) -> None:
    model = made(name, number)
    whole = read(model, 1)
    for pieces in (2, 5):
        np.testing.assert_array_equal(read(model, pieces), whole)


@pytest.mark.parametrize(("name", "number"), RECURRENT)
def test_steps_of_several_sequences_equal_each_alone_in_every_bit(
    name: str, number: int, made: Callable[[str, int], Made]
) -> None:
    model = made(name, number)
    steps = [[in_slot(slot, LENGTHS[slot] + step, 1, True) for slot in range(SLOTS)] for step in range(4)]
    ids = [np.array([model.ids[one.slot, one.position] for one in runs]) for runs in steps]
    read(model, 1)
    alone = [[forward(model, some[[slot]], [runs[slot]])[0] for slot in range(SLOTS)]
             for some, runs in zip(ids, steps, strict=True)]  # fmt: skip
    read(model, 1)
    together = [forward(model, some, runs) for some, runs in zip(ids, steps, strict=True)]
    np.testing.assert_array_equal(together, alone)


def test_what_layers_keep_of_a_sequence() -> None:
    def kept(name: str, number: int, half: bool) -> list[set[tuple[str, tuple[int, ...], str]]]:
        values: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 6, "vocab_size": 9}
        values |= {"num_key_value_heads": 2}
        model = describe({"model_type": name, **values, "intermediate_size": 8, **VARIANTS[name][number]}).model
        return [
            {(a.name, (a.heads, a.width), a.dtype) for a in state.tokens}
            | {(a.name, a.shape, a.dtype) for a in state.fixed}
            for state in model.states(half)[:2]
        ]

    both = {("keys", (2, 8), "float16"), ("values", (2, 8), "float16")}
    assert kept("lfm2", 0, half=True) == [{("convolution", (3, 48), "float32")}, both]
    both = {("keys", (2, 256), "float32"), ("values", (2, 256), "float32")}
    delta = {("convolution", (3, 96), "float32"), ("recurrent", (4, 8, 16), "float32")}
    assert kept("qwen3_5_text", 0, half=False) == [delta, both]
    space = {("convolution", (3, 112), "float32"), ("recurrent", (4, 8, 24), "float32")}
    both = {("keys", (2, 8), "float32"), ("values", (2, 8), "float32")}
    assert kept("granitemoehybrid", 0, half=False) == [space, both]
    assert kept("youtu", 0, half=True) == [{("latent", (1, 32), "float16")}] * 2  # 24 and 4, as wide as is taken


@pytest.mark.parametrize(("name", "number"), [("qwen3_5_moe_text", 0), ("qwen3_moe", 0)])
def test_experts_may_lie_in_two_stacks(name: str, number: int, tmp_path: Path) -> None:
    """As published Qwen3.5 has them."""
    model = make(name, number, VARIANTS[name][number], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts."
        if not (count := sum(key.startswith(prefix) for key in tensors) // 3):
            continue
        gate, up, down = (
            np.stack([tensors.pop(f"{prefix}{one}.{part}_proj.weight") for one in range(count)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}down_proj": down}
    save_file(tensors, path)
    values = json.loads(read_model(tmp_path, "float32", "none", accelerator=False).config)
    described = describe(values)
    assert {weights.stacks.form for weights in described.blocks if weights.stacks is not None} == {"halves"}
    stacked = load(described, tmp_path, 0, LAYERS + 1)
    one = [in_slot(0, 0, 30, True)]
    np.testing.assert_array_equal(stacked.forward(model.ids[0, :30], one), forward(model, model.ids[0, :30], one))
