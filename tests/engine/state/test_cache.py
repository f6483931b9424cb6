"""One layer of a slot against transformers' own cache layers and against plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from peerllm.engine import base
from peerllm.engine.state.kv_cache import slot_caches
from peerllm.engine.state.layer_states import SlotLayer
from peerllm.engine.state.state_kinds import LayerState, TokenArray, keys_and_values, slot_bytes
from peerllm.errors import EngineError

CONTEXT = 200


@pytest.fixture(autouse=True)
def short_memory(monkeypatch):
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", 4)


def layer(window: int | None) -> SlotLayer:
    kind = "full_attention" if window is None else "sliding_attention"
    arguments = {} if window is None else {"sliding_window": window}
    return slot_caches([kind], [arguments], {0: kept("float32", window)}, 2, CONTEXT)[1].layers[0]


def kept(dtype: str, window: int | None = None) -> LayerState:
    return LayerState((TokenArray("keys", 2, 3, dtype), TokenArray("values", 2, 5, dtype)), (), window)


def tokens(start: int, count: int, width: int) -> torch.Tensor:
    """Keys or values [1, 2, count, width] that tell their position."""
    return torch.arange(start, start + count, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, count, width)


@settings(max_examples=60)
@given(window=st.sampled_from([None, 1, 2, 5, 16]), counts=st.lists(st.integers(1, 30), max_size=12))
def test_same_as_transformers(window, counts):
    base.ROLLBACK_TOKENS = 4
    ours, theirs = layer(window), DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    position = 0
    for count in counts:
        if position + count > CONTEXT:
            break
        if window != 1:  # transformers' own keeps all with a window of one
            assert ours.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        keys, values = tokens(position, count, 3), tokens(position, count, 5)
        got = ours.update(keys, values)
        if window != 1:
            want = theirs.update(keys, values)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert ours.get_seq_length() == theirs.get_seq_length()
        else:
            assert torch.equal(got[0], keys)
        position += count


@settings(max_examples=80)
@given(
    window=st.sampled_from([None, 2, 5, 16]),
    moves=st.lists(st.tuples(st.integers(1, 25), st.integers(0, 4)), max_size=14),
)
def test_goes_back_as_far_as_promised(window, moves):
    """As base.Reach allows: going back twice does not bring back what was dropped; it counts from the furthest."""
    base.ROLLBACK_TOKENS = 4
    ours, held, furthest = layer(window), [], 0
    for count, back in moves:
        if len(held) + count > CONTEXT:
            break
        held = held[: min(len(held), max(len(held) - back, furthest - base.ROLLBACK_TOKENS, 0))]
        ours.seek(len(held))
        shown, offset = ours.get_mask_sizes(count)
        held = [*held, *range(len(held), len(held) + count)]
        keys, values = ours.update(tokens(len(held) - count, count, 3), tokens(len(held) - count, count, 5))
        assert keys[0, 1, :, 2].tolist() == values[0, 0, :, 4].tolist() == held[offset : offset + shown]
        assert offset + shown == len(held)
        furthest = max(furthest, len(held))


@pytest.mark.parametrize("length", [14, 18, 30])
def test_a_window_goes_back_while_it_is_whole_and_no_further(length: int) -> None:
    window = 5
    ours, other = layer(window), layer(window)
    for one in (ours, other):
        for position in range(length):
            one.update(tokens(position, 1, 3), tokens(position, 1, 5))
    furthest_back = ours.held - (window - 1)
    with pytest.raises(EngineError, match="too far back"):
        other.seek(length - furthest_back - 1)
    ours.seek(length - furthest_back)
    keys, _ = ours.update(tokens(90, 1, 3), tokens(90, 1, 5))
    start = length - furthest_back
    assert keys[0, 0, :, 0].tolist() == [*range(start - window + 1, start), 90]


def test_a_full_slot_refuses():
    ours = layer(None)
    ours.update(tokens(0, CONTEXT, 3), tokens(0, CONTEXT, 5))
    with pytest.raises(EngineError, match="full"):
        ours.update(tokens(0, 1, 3), tokens(0, 1, 5))


def test_a_windowed_layer_takes_no_more_room_than_told():
    state = kept("float16", 10)
    stored = slot_caches(["sliding_attention"], [{"sliding_window": 10}], {0: state}, 3, 10_000)[0].layers[0].keys
    assert stored.shape[2] == state.kept_tokens
    assert slot_bytes([state], 3, 10_000) == 3 * state.kept_tokens * 2 * (3 + 5) * 2
    assert state.kept_tokens == 18


def test_layers_of_other_shards_only_count():
    state = keys_and_values(2, 3, "float32")
    one = slot_caches(["full_attention"] * 2 + ["linear_attention"], [{}, {}, {}], {1: state}, 1, 50)[0]
    one.seek(0)
    one.layers[1].update(tokens(0, 7, 3), tokens(0, 7, 3))
    one.advance(7)
    assert [one.get_seq_length(0), one.get_seq_length(1)] == [7, 7]
    assert one.get_mask_sizes(2, 0) == (9, 0)
    assert one.has_previous_state(2)
    one.seek(0)
    assert one.get_seq_length(0) == 0
    assert not one.has_previous_state(2)
