"""Slots of a shard: sequences interleaved, in chunks, rolled back and started afresh do not disturb each other."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peerllm.engine import base
from peerllm.engine.messages import Inspected
from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_shard import TorchShard, load_shard
from peerllm.errors import BadInputError, EngineError
from peerllm.transport.frames.token_run import TokenRun
from tests.engine.architectures import FAMILIES, VOCABULARY, quiet, save, stage, tiny_model
from tests.engine.runs import in_slot

SLOTS, CONTEXT = 3, 40


@lru_cache
def whole(model_type: str) -> tuple[Any, Inspected]:
    """The model as transformers runs it, and its inspection."""
    quiet()
    torch.set_num_threads(1)
    family = next(family for family in FAMILIES if family.model_type == model_type)
    directory = Path(mkdtemp())
    return save(tiny_model(family, 1.0, 0), directory), inspect_model(directory)


def chain(model_type: str, *firsts: int) -> list[TorchShard]:
    inspection = whole(model_type)[1]
    ends = [*firsts[1:], len(inspection.profile.layers)]
    return [load_shard(stage(inspection, a, b - 1, SLOTS, CONTEXT)) for a, b in zip(firsts, ends, strict=True)]


def run(shards: list[TorchShard], ids: list[int], runs: list[TokenRun]) -> torch.Tensor:
    row = np.array(ids)
    for shard in shards:
        row = shard.forward(row, runs)
    return torch.from_numpy(row)


def expected(model_type: str, ids: list[int]) -> torch.Tensor:
    """Logits after the last of `ids`, without a cache."""
    with torch.inference_mode():
        return whole(model_type)[0](torch.tensor([ids]), use_cache=False).logits[0, -1].float()


# llama: full attention; ministral: windows of five beside full layers; gpt2: positions in the embedding.
MODELS = ("llama", "ministral", "gpt2", "deepseek_v3")

steps = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, SLOTS - 1),
            st.integers(1, 9),  # tokens of the chunk
            st.sampled_from([0, 0, 0, 1, 2, 3, 99]),  # tokens to roll back first; 99: start afresh
        ),
        min_size=1,
        max_size=SLOTS,
        unique_by=lambda step: step[0],
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("model_type", MODELS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, seed=st.integers(0, 2**20))
def test_slots_do_not_disturb_each_other(model_type, steps, seed, monkeypatch):
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", 3)  # so that windows slide within the test's lengths
    shards = chain(model_type, 0, 2, 4)
    generator = torch.Generator().manual_seed(seed)
    held: dict[int, list[int]] = {slot: [] for slot in range(SLOTS)}
    for packed in steps:
        ids, runs = [], []
        for slot, count, back in packed:
            held[slot] = held[slot][: max(len(held[slot]) - back, 0)]
            if len(held[slot]) + count > CONTEXT:
                held[slot] = []
            new = torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
            runs.append(in_slot(slot, len(held[slot]), count, sample=True))
            held[slot] = held[slot] + new
            ids += new
        logits = run(shards, ids, runs)
        assert logits.shape == (len(runs), VOCABULARY)
        for each, got in zip(runs, logits, strict=True):
            torch.testing.assert_close(got, expected(model_type, held[each.slot]), atol=1e-4, rtol=1e-4)


def test_only_sampled_segments_give_logits():
    shards = chain("llama", 0, 3)
    ids = list(range(3, 12))
    runs = [in_slot(0, 0, 4), in_slot(1, 0, 3, sample=True), in_slot(2, 0, 2)]
    logits = run(shards, ids, runs)
    assert logits.shape == (1, VOCABULARY)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], expected("llama", ids[4:7]), atol=1e-4, rtol=1e-4)
    assert run(shards, [5], [in_slot(0, 4, 1)]).shape == (0, VOCABULARY)
    assert shards[0].forward(np.array([5, 6]), [in_slot(0, 5, 2)]).shape == (2, 32)


def test_head_alone_runs_nothing_for_segments_without_sample():
    *before, head = chain("llama", 0, 5)
    hidden = before[0].forward(np.arange(3, 8), [in_slot(0, 0, 5)])
    assert head.forward(hidden, [in_slot(0, 0, 5)]).shape == (0, VOCABULARY)
    hidden = before[0].forward(np.array([9]), [in_slot(0, 5, 1, sample=True)])
    got = head.forward(hidden, [in_slot(0, 5, 1, sample=True)])
    torch.testing.assert_close(torch.from_numpy(got[0]), expected("llama", [*range(3, 8), 9]), atol=1e-4, rtol=1e-4)


def test_a_gap_is_refused_and_harms_nothing():
    shards = chain("llama", 0)
    run(shards, [3, 4, 5], [in_slot(0, 0, 3)])
    with pytest.raises(EngineError, match="gap"):
        run(shards, [7], [in_slot(0, 4, 1)])
    got = run(shards, [6], [in_slot(0, 3, 1, sample=True)])
    torch.testing.assert_close(got[0], expected("llama", [3, 4, 5, 6]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("ids", "runs"),
    [
        ([3], [in_slot(SLOTS, 0, 1)]),
        ([3], [in_slot(-1, 0, 1)]),
        ([3], [in_slot(0, -1, 1)]),
        ([3], [in_slot(0, CONTEXT, 1)]),
        ([3] * (CONTEXT + 1), [in_slot(0, 0, CONTEXT + 1)]),
        ([3, 4], [in_slot(0, 0, 1)]),
        ([3], [in_slot(0, 0, 1), in_slot(1, 0, 0)]),
        ([VOCABULARY], [in_slot(0, 0, 1)]),
        ([-1], [in_slot(0, 0, 1)]),
    ],
)
def test_rows_that_cannot_be(ids, runs):
    with pytest.raises(BadInputError):
        run(chain("llama", 0), ids, runs)


def test_hidden_states_of_the_wrong_width():
    with pytest.raises(BadInputError, match="hidden states"):
        chain("llama", 0, 2)[1].forward(np.zeros((1, 31), np.float32), [in_slot(0, 0, 1)])


def test_a_slot_holds_its_full_context():
    shards = chain("ministral", 0, 2)
    ids = torch.randint(0, VOCABULARY, (CONTEXT,), generator=torch.Generator().manual_seed(1)).tolist()
    run(shards, ids[:-1], [in_slot(1, 0, CONTEXT - 1)])
    got = run(shards, ids[-1:], [in_slot(1, CONTEXT - 1, 1, sample=True)])
    torch.testing.assert_close(got[0], expected("ministral", ids), atol=1e-4, rtol=1e-4)


def test_a_window_cannot_go_back_further_than_it_remembers(monkeypatch):
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", 2)
    shards = chain("mistral", 0)
    run(shards, [3 + n for n in range(30)], [in_slot(0, 0, 30)])
    with pytest.raises(EngineError, match="replay"):
        run(shards, [3], [in_slot(0, 8, 1)])
    got = run(shards, [3, 4], [in_slot(0, 0, 2, sample=True)])  # afresh is always possible
    torch.testing.assert_close(got[0], expected("mistral", [3, 4]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2"])
def test_recurrent_layers_take_turns_and_chunks_but_do_not_go_back(model_type):
    shards = chain(model_type, 0, 2, 4)
    a, b = [5, 9, 33, 71, 12, 8, 40], [7, 60, 2, 44]
    run(shards, a[:4] + b[:1], [in_slot(0, 0, 4), in_slot(2, 0, 1)])
    run(shards, a[4:6] + b[1:3], [in_slot(0, 4, 2), in_slot(2, 1, 2)])
    got = run(shards, a[6:] + b[3:], [in_slot(0, 6, 1, True), in_slot(2, 3, 1, True)])
    torch.testing.assert_close(got[0], expected(model_type, a), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], expected(model_type, b), atol=1e-4, rtol=1e-4)
    with pytest.raises(EngineError, match="replay"):
        run(shards, [3], [in_slot(0, 4, 1)])
    got = run(shards, b, [in_slot(0, 0, 4, True)])
    torch.testing.assert_close(got[0], expected(model_type, b), atol=1e-4, rtol=1e-4)


def test_a_pass_that_fails_can_be_repeated(monkeypatch):
    shards = chain("llama", 0)
    run(shards, [3, 4, 5], [in_slot(0, 0, 3)])
    last = shards[0].blocks[-1]
    hook = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        run(shards, [6], [in_slot(0, 3, 1, True)])
    hook.remove()
    got = run(shards, [6], [in_slot(0, 3, 1, True)])
    torch.testing.assert_close(got[0], expected("llama", [3, 4, 5, 6]), atol=1e-4, rtol=1e-4)


def test_one_that_cannot_be_harms_no_other():
    shards = chain("mistral", 0)
    a, b = [3 + n for n in range(12)], [40 + n for n in range(7)]
    run(shards, a[:10] + b[:6], [in_slot(0, 0, 10), in_slot(1, 0, 6)])
    with pytest.raises(EngineError, match="gap"):
        run(shards, [1, 2], [in_slot(0, 10, 1, True), in_slot(1, 9, 1, True)])
    got = run(shards, a[10:] + b[6:], [in_slot(0, 10, 2, True), in_slot(1, 6, 1, True)])
    torch.testing.assert_close(got[0], expected("mistral", a), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], expected("mistral", b), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "ministral", "gpt_oss"])
def test_half_precision(model_type, dtype):
    """Hidden states travel in the dtype computed in, also from memory that must not be written to."""
    inspection = replace(whole(model_type)[1], dtype=dtype)
    first, second = (load_shard(stage(inspection, a, b, SLOTS, CONTEXT)) for a, b in ((0, 2), (3, 5)))
    ids, runs = [3, 50, 7, 7, 90, 12, 4, 66, 31], [in_slot(1, 0, 9, True)]
    hidden = first.forward(np.array(ids), runs)
    assert hidden.dtype == {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    hidden.flags.writeable = False
    got, want = torch.from_numpy(second.forward(hidden, runs)[0]), expected(model_type, ids)
    assert (got - want).norm() / want.norm() < (0.1 if dtype == "bfloat16" else 0.02)


def test_release_and_close():
    shards = chain("llama", 0)
    run(shards, [3, 4, 5], [in_slot(0, 0, 3)])
    shards[0].release(0)
    with pytest.raises(EngineError, match="gap"):
        run(shards, [6], [in_slot(0, 3, 1)])
    shards[0].close()
    shards[0].close()
    with pytest.raises(EngineError, match="closed"):
        run(shards, [6], [in_slot(0, 0, 1)])


def test_a_block_holds_neither_embedding_nor_head():
    inspection = whole("gemma")[1]
    shard = load_shard(stage(inspection, 2, 3))
    sizes = inspection.profile.layers
    assert shard.weight_bytes == sizes[2].memory_bytes + sizes[3].memory_bytes
    assert sum(shard.weights.values()) == shard.weight_bytes


def test_a_tied_head_back_on_the_source_costs_nothing():
    """An embedding's stage and the head's, in one process: what they share is counted, and held, once."""
    inspection = whole("gemma")[1]
    last = len(inspection.profile.layers) - 1
    first, head = load_shard(stage(inspection, 0, 1)), load_shard(stage(inspection, last, last))
    both = {**first.weights, **head.weights}
    assert inspection.profile.layers[last].tied_to == 0
    assert sum(both.values()) < first.weight_bytes + head.weight_bytes // 2


def test_room_for_keys_and_values_is_made_beforehand():
    whole.cache_clear()
    inspection = whole("ministral")[1]
    windowed, full = inspection.profile.layers[1], inspection.profile.layers[2]
    assert windowed.kind == "block:sliding_attention"
    assert full.kind == "block:full_attention"
    assert full.kv_window_tokens is None
    assert windowed.kv_window_tokens == 5 + 2 * base.ROLLBACK_TOKENS
    shard = load_shard(stage(inspection, 1, 2, slots=2, context=1000))
    assert shard.kv_bytes == 2 * full.kv_bytes_per_token * (1000 + windowed.kv_window_tokens)


@pytest.mark.parametrize("rope", ["dynamic", "yarn", "linear", "llama3", "longrope"])
def test_scaled_rotary_embeddings(rope, tmp_path):
    """Each sequence has the scale of its own length, whatever ran before."""
    quiet()
    family = next(family for family in FAMILIES if family.model_type == "llama")
    scaling: dict[str, Any] = {"rope_type": rope, "rope_theta": 100.0, "factor": 4.0}
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    if rope in ("yarn", "longrope"):
        scaling |= {"original_max_position_embeddings": 8}
    if rope == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    family = replace(
        family, config={"max_position_embeddings": 16 if rope == "dynamic" else 64, "rope_parameters": scaling}
    )
    model = save(tiny_model(family, 1.0, 0), tmp_path)
    inspection = inspect_model(tmp_path)
    shards = [load_shard(stage(inspection, a, b, SLOTS, CONTEXT)) for a, b in ((0, 2), (3, 5))]
    for length in (30, 6, 20):
        ids = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        with torch.inference_mode():
            want = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        got = run(shards, ids, [in_slot(0, 0, length, True)])
        torch.testing.assert_close(got[0], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("firsts", [(0,), (0, 2), (0, 2, "head")])
def test_last_states_are_what_the_head_is_given(model_type, firsts):
    head = len(whole(model_type)[1].profile.layers) - 1
    shards = chain(model_type, *(head if first == "head" else first for first in firsts))
    ids = [(7 * place + 3) % VOCABULARY for place in range(20)]
    with torch.inference_mode():
        wanted = whole(model_type)[0].base_model(torch.tensor([ids]), use_cache=False)[0][0].float().numpy()
    found = []
    for start, length in ((0, 8), (8, 1), (9, 11)):
        part = in_slot(1, start, length, True)
        rows = np.array(ids[start : start + length])
        for shard in shards[:-1]:
            rows = shard.forward(rows, [part])
        found.append(shards[-1].last_states(rows, part))
    np.testing.assert_allclose(np.concatenate(found), wanted, rtol=1e-4, atol=1e-5)
