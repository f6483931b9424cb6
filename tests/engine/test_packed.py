"""Packed rows: many sequences in one, against the whole model without a cache; windows, rollback, failures, memory."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine import states
from peerllm.engine.base import Segment
from peerllm.engine.config import parse_config
from peerllm.engine.division import divide
from peerllm.engine.inspect import Inspection, inspect_model
from peerllm.engine.probing import probe
from peerllm.engine.shard import TorchShard, load_shard
from peerllm.engine.wiring import obstacle
from peerllm.errors import EngineError
from tests.engine.architectures import COMMON, FAMILIES, VOCABULARY, quiet, save, stage, tiny_model

SLOTS, CONTEXT = 4, 48
# Full attention; every layer windowed; windows beside full layers; soft caps; sinks; experts; positions by table.
MODELS = ("llama", "mistral", "ministral", "gemma2", "gpt_oss", "mixtral", "gpt2")


@lru_cache
def whole(model_type: str) -> tuple[Any, Inspection]:
    """The model as transformers runs it, and its inspection."""
    quiet()
    torch.set_num_threads(1)
    family = next(family for family in FAMILIES if family.model_type == model_type)
    directory = Path(mkdtemp())
    return save(tiny_model(family, 1.0, 0), directory), inspect_model(directory)


def chain(model_type: str, *firsts: int, slots: int = SLOTS, dtype: str = "float32") -> list[TorchShard]:
    inspection = replace(whole(model_type)[1], dtype=dtype)
    ends = [*firsts[1:], len(inspection.profile.layers)]
    shards = [load_shard(stage(inspection, a, b - 1, slots, CONTEXT)) for a, b in zip(firsts, ends, strict=True)]
    assert all(shard.unpacked is None for shard in shards)
    return shards


def run(shards: list[TorchShard], ids: list[int], segments: list[Segment]) -> torch.Tensor:
    row = torch.tensor(ids)
    for shard in shards:
        row = shard.forward(row, segments)
    return row


def expected(model_type: str, ids: list[int]) -> torch.Tensor:
    """Logits after the last of `ids`, without a cache."""
    with torch.inference_mode():
        return whole(model_type)[0](torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


batches = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, SLOTS - 1),
            st.sampled_from([1, 1, 1, 2, 5, 13, 30]),  # a step, or a chunk
            st.booleans(),  # to sample after
            st.sampled_from([0, 0, 0, 1, 3, 99]),  # tokens to roll back first; 99: the slot is taken by another
        ),
        min_size=1,
        max_size=SLOTS,
        unique_by=lambda piece: piece[0],
    ),
    min_size=1,
    max_size=7,
)


@pytest.mark.parametrize("model_type", MODELS)
@settings(max_examples=10, deadline=None)
@given(batches=batches, seed=st.integers(0, 2**20))
def test_every_mix_gives_what_each_gives_alone(model_type, batches, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "ROLLBACK_TOKENS", 3)  # so that windows slide, and chunks are longer than their room
        shards = chain(model_type, 0, 3)
        generator = torch.Generator().manual_seed(seed)
        held: dict[int, list[int]] = {slot: [] for slot in range(SLOTS)}
        for packed in batches:
            ids, segments = [], []
            for slot, count, sample, back in packed:
                held[slot] = held[slot][: max(len(held[slot]) - back, 0)]
                if len(held[slot]) + count > CONTEXT:
                    held[slot] = []
                new = torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()
                segments.append(Segment(slot, len(held[slot]), count, sample))
                held[slot] = held[slot] + new
                ids += new
            logits = run(shards, ids, segments)
            asked = [segment.slot for segment in segments if segment.sample]
            assert logits.shape == (len(asked), VOCABULARY)
            for slot, got in zip(asked, logits, strict=True):
                torch.testing.assert_close(got, expected(model_type, held[slot]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "ministral"])
def test_linear_layers_run_once_over_the_whole_row(model_type):
    (shard,) = chain(model_type, 0)
    seen = []
    for block in shard.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape[:2])))
    run([shard], random_ids(9, 1), [Segment(0, 0, 4), Segment(1, 0, 5)])
    seen.clear()
    run([shard], random_ids(9, 2), [Segment(0, 4, 1, True), Segment(1, 5, 1, True), Segment(2, 0, 7)])
    assert seen == [(1, 9)] * len(shard.blocks)


def test_a_step_copies_no_cache():
    """Views of the slots reach attention: their memory is the room itself, whatever the context."""
    (shard,) = chain("llama", 0)
    run([shard], random_ids(20, 1), [Segment(0, 0, 8), Segment(3, 0, 12)])
    stores = [store for group in shard._slots._groups for pair in group.stores for store in pair]
    pointers = [(store.data_ptr(), store.data_ptr() + store.nbytes) for store in stores]
    shown = []
    watched = torch.nn.functional.scaled_dot_product_attention

    def watch(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        shown.append((keys, kwargs.get("attn_mask")))
        return watched(query, keys, values, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peerllm.engine.attention.scaled_dot_product_attention", watch)
        run([shard], [3, 4], [Segment(0, 8, 1, True), Segment(3, 12, 1, True)])
    assert [keys.shape[2] for keys, _ in shown] == [9, 13] * len(shard.blocks)
    assert all(mask is None for _, mask in shown)
    assert all(any(a <= keys.data_ptr() < b for a, b in pointers) for keys, _ in shown)


def test_a_slot_may_stand_in_a_row_twice():
    shards = chain("ministral", 0, 2)
    a, b = random_ids(9, 3), random_ids(4, 4)
    row = [Segment(1, 0, 5), Segment(0, 0, 4, True), Segment(1, 5, 4, True)]
    got = run(shards, a[:5] + b + a[5:], row)
    torch.testing.assert_close(got[0], expected("ministral", b), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], expected("ministral", a), atol=1e-4, rtol=1e-4)


def test_one_that_cannot_be_moves_none():
    """A gap in one sequence is refused before another's slot has changed."""
    shards = chain("mistral", 0)
    a, b = random_ids(12, 5), random_ids(7, 6)
    run(shards, a[:10] + b[:6], [Segment(0, 0, 10), Segment(1, 0, 6)])
    with pytest.raises(EngineError, match="gap"):
        run(shards, [1, 2], [Segment(0, 3, 1, True), Segment(1, 9, 1, True)])
    got = run(shards, a[10:] + b[6:], [Segment(0, 10, 2, True), Segment(1, 6, 1, True)])
    torch.testing.assert_close(got[0], expected("mistral", a), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], expected("mistral", b), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_batch_that_fails_can_be_repeated_by_each(model_type, monkeypatch):
    """Also where the room slid before the failure, and whatever the failed batch had written."""
    monkeypatch.setattr(states, "ROLLBACK_TOKENS", 3)
    shards = chain(model_type, 0)
    a, b = random_ids(13, 7), random_ids(15, 8)
    run(shards, a[:10] + b[:11], [Segment(0, 0, 10), Segment(2, 0, 11)])
    hook = shards[0].blocks[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        run(shards, random_ids(5, 9), [Segment(0, 10, 3, True), Segment(2, 11, 2, True)])
    hook.remove()
    got = run(shards, b[11:], [Segment(2, 11, 4, True)])
    torch.testing.assert_close(got[0], expected(model_type, b), atol=1e-4, rtol=1e-4)
    got = run(shards, a[10:], [Segment(0, 10, 3, True)])
    torch.testing.assert_close(got[0], expected(model_type, a), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "ministral", "gpt_oss"])
def test_half_precision(model_type, dtype):
    """In these dtypes sums differ in the last bit; packed and alone stay as near as the dtype lets them."""
    packed, alone = chain(model_type, 0, 2, dtype=dtype), chain(model_type, 0, 2, dtype=dtype)
    a, b, c = random_ids(9, 10), random_ids(12, 11), random_ids(6, 12)
    run(packed, a[:8] + b[:7], [Segment(0, 0, 8), Segment(1, 0, 7)])
    got = run(packed, a[8:] + b[7:] + c, [Segment(0, 8, 1, True), Segment(1, 7, 5, True), Segment(3, 0, 6, True)])
    for slot, ids in enumerate((a, b, c)):
        want = run(alone, ids, [Segment(slot, 0, len(ids), True)])[0]
        assert (got[slot] - want).norm() / want.norm() < (0.05 if dtype == "bfloat16" else 0.01)


def test_the_room_is_what_was_planned():
    whole.cache_clear()  # another test's rollback may be in it
    inspection = whole("ministral")[1]
    shard = load_shard(stage(inspection, 1, 2, slots=2, context=1000))
    stores = [store for group in shard._slots._groups for pair in group.stores for store in pair]
    assert shard.kv_bytes == sum(store.nbytes for store in stores)
    windowed, full = inspection.profile.layers[1:3]
    assert shard.kv_bytes == 2 * full.kv_bytes_per_token * (1000 + windowed.kv_window_tokens)


def wired(model_type: str, **options: Any) -> str | None:
    """What keeps a model with these options from being packed."""
    from transformers import AutoConfig

    family = next(family for family in FAMILIES if family.model_type == model_type)
    values = {key: value for key, value in COMMON.items() if key not in family.without}
    config = AutoConfig.for_model(model_type, **{**values, **family.config, **options})
    division = divide(parse_config(config.to_json_string(use_diff=False)), torch.float32)
    return obstacle(division, probe(division, range(len(division.blocks))))


LONG = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
LONGROPE = {**LONG, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("llama", {}, None),
        ("llama", {"rope_parameters": {**LONG, "rope_type": "yarn"}}, None),
        ("llama", {"rope_parameters": {**LONG, "rope_type": "dynamic"}}, "longest position"),
        ("phi3", {"rope_parameters": LONGROPE}, "longest position"),
        ("qwen3_next", {}, "linear_attention"),
        ("falcon_h1", {}, "hybrid"),
        ("bloom", {}, "positions"),
        ("falcon", {}, "how long"),
        ("gptj", {}, "its own"),
        ("deepseek_v3", {}, "than it keeps"),
        ("doge", {}, "mask"),
    ],
)
def test_what_keeps_a_model_from_being_packed(model_type, options, reason):
    found = wired(model_type, **options)
    assert (found is None) if reason is None else (reason in (found or "")), found


def test_a_mask_other_than_the_layers_window_is_noticed(monkeypatch):
    """A model whose own mask shows more or less than its cache layer says is not trusted."""
    from transformers.models.mistral import modeling_mistral

    monkeypatch.setattr(
        modeling_mistral, "create_sliding_window_causal_mask", modeling_mistral.create_causal_mask
    )  # the layers still say: a window of five
    assert wired("mistral") == "its mask is its own"


def test_attention_refuses_what_it_does_not_know():
    """If a layer hands over something new, or other keys than it stored, it fails instead of guessing."""
    (shard,) = chain("llama", 0)
    inner = shard.blocks[1].self_attn
    straight = inner.forward
    inner.forward = lambda *args, **kwargs: straight(*args, **kwargs, position_bias=torch.zeros(1))
    with pytest.raises(EngineError, match="position_bias"):
        run([shard], [3, 4], [Segment(0, 0, 1), Segment(1, 0, 1)])
    inner.forward = straight
    cache = shard._slots._cache
    update = cache.update
    cache.update = lambda *args, **kwargs: tuple(tensor.clone() for tensor in update(*args, **kwargs))
    with pytest.raises(EngineError, match="other keys"):
        run([shard], [3, 4], [Segment(0, 0, 1), Segment(1, 0, 1)])
