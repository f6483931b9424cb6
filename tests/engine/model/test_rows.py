"""Gemma 3n and Gemma 4: what the planner is told of them, and what travels from shard to shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerllm.engine.backends import Backends
from peerllm.engine.messages import Inspect, TimeLayers
from peerllm.engine.model.torch_backend import TorchBackend
from peerllm.engine.model.torch_inspect import inspect_model
from tests.engine.architectures import CONTEXT, FAMILIES, VOCABULARY, load, save, tiny_model
from tests.engine.runs import in_slot

HIDDEN, EACH, BLOCKS, STREAMS = 32, 8, 7, 3
UNITS = (range(0, 1), range(1, 2), range(2, 3), range(3, 7))
IDS = np.array([3, 5, 7, 11, 13, 17, 19, 23, 29])
NAMES = ("Gemma 4 (shared keys)", "Gemma 3n (text)")

pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture(scope="module", params=NAMES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp("model")
    save(tiny_model(next(family for family in FAMILIES if family.name == request.param), 1.0, 0), directory)
    return request.param, directory


def widths(name: str) -> list[int]:
    """Of the rows that each layer but the head hands on."""
    streams = STREAMS if "3n" in name else 1
    return [streams * HIDDEN + EACH * (BLOCKS - done) for done in (0, *(unit.stop for unit in UNITS))]


def forward(shards: Any, rows: Any = IDS) -> Any:
    for shard in shards:
        rows = shard.forward(rows, [in_slot(0, 0, len(IDS), True)])
    return rows


def test_blocks_that_share_keys_and_values_are_one_layer(saved: tuple[str, Path]) -> None:
    name, directory = saved
    found = inspect_model(directory, "float32")
    _, *blocks, _ = layers = found.profile.layers
    assert [one.name for one in layers] == ["embedding", "block 0", "block 1", "block 2", "blocks 3 to 6", "head"]
    assert [one.output_bytes_per_token for one in layers[:-1]] == [4 * width for width in widths(name)]
    assert found.mixed_rows and found.exact_rows
    each = {number: [t.name for t in tensors] for number, tensors in enumerate(found.tensors)}
    for number, unit in enumerate(UNITS, 1):
        assert {int(tensor.split(".")[2]) for tensor in each[number]} == set(unit)
    assert "model.embed_tokens_per_layer.weight" in each[0]
    assert not any("per_layer" in tensor for tensor in each[5])
    assert blocks[3].memory_bytes > 3 * blocks[2].memory_bytes
    # One block keeps a window, one everything, and two nothing.
    a_token = blocks[1].kv_bytes_per_token
    assert (blocks[3].kv_bytes_per_token, blocks[3].kv_window_tokens) == (a_token, None)
    assert blocks[3].state_bytes_per_sequence == blocks[0].kv_bytes_per_token * blocks[0].kv_window_tokens
    assert len({one.kind for one in blocks}) == 3 or "3n" in name


def test_rows_hold_what_later_blocks_need_and_nothing_else(saved: tuple[str, Path]) -> None:
    name, directory = saved
    found = inspect_model(directory, "float32")
    shards = load(found, ((0, 0), (1, 2), (3, 4), (5, 5)))
    rows = [shards[0].forward(IDS, [in_slot(0, 0, len(IDS))])]
    for shard in shards[1:3]:
        assert rows[-1].shape[1] == shard.hidden_size
        rows.append(shard.forward(rows[-1], [in_slot(0, 0, len(IDS))]))
    assert [one.shape[1] for one in rows] == [widths(name)[layer] for layer in (0, 2, 4)]
    assert max(shard.hidden_size for shard in shards) == shards[0].hidden_size == widths(name)[0]
    passed = rows[0][:, -EACH * 5 :]  # through blocks 0 and 1 go the inputs of the five others
    np.testing.assert_array_equal(rows[1][:, -EACH * 5 :], passed)
    whole = forward(shards)
    for block in (0, 4, 6):  # a control: every block reads its own
        other = rows[0].copy()
        start = other.shape[1] - EACH * (BLOCKS - block)
        other[:, start : start + EACH] += 1.0
        assert np.abs(forward(shards[1:], other) - whole).max() > 1e-3, block


def test_the_table_of_inputs_stays_in_its_file(saved: tuple[str, Path]) -> None:
    _, directory = saved
    table = BLOCKS * EACH * VOCABULARY * 4
    for quantize in ("none", "int8"):
        found = inspect_model(directory, "float32", quantize)
        (shard,) = load(found, ((0, 0),), TorchBackend())
        assert 0 < shard.weight_bytes == found.profile.layers[0].memory_bytes
        mapped = table + (VOCABULARY * HIDDEN * 4 if quantize == "int8" else 0)
        assert sum(tensor.nbytes for tensor in found.tensors[0]) - shard.weight_bytes == mapped


def test_a_sequence_can_go_back_though_some_blocks_keep_nothing(saved: tuple[str, Path]) -> None:
    _, directory = saved
    (shard,) = load(inspect_model(directory, "float32"), ((0, 5),))
    assert shard.reach is not None and shard.reach.rewinds
    whole = forward([shard])
    shard.forward(IDS[4:], [in_slot(0, 4, 5, True)])
    again = shard.forward(IDS[-1:], [in_slot(0, 8, 1, True)])
    np.testing.assert_allclose(again, whole, atol=1e-5)


def test_layers_are_timed_in_rows_of_their_own_width(saved: tuple[str, Path]) -> None:
    _, directory = saved
    found = inspect_model(directory, "float32")
    message = TimeLayers(1, found.config, "float32", 1 << 31)
    timed = TorchBackend().time_layers(message, lambda: None)
    assert {one.kind for one in found.profile.layers} <= timed.layer_ms.keys()
    assert not timed.skipped


def test_what_is_promised_for_keys_and_values_is_what_is_taken(saved: tuple[str, Path]) -> None:
    _, directory = saved
    found = inspect_model(directory, "float32")
    unit = found.profile.layers[4]
    (shard,) = load(found, ((4, 4),))
    window = found.profile.layers[1]
    kept = min(CONTEXT, window.kv_window_tokens or 0) * window.kv_bytes_per_token
    assert shard.kv_bytes == 3 * (CONTEXT * unit.kv_bytes_per_token + kept)


def test_other_models_have_rows_of_hidden_states_alone(tmp_path: Path) -> None:
    save(tiny_model(next(family for family in FAMILIES if family.name == "Gemma 4 (dense)"), 1.0, 0), tmp_path)
    found = Backends().inspect(Inspect(1, str(tmp_path), "float32"))
    assert not found.mixed_rows
    assert {one.output_bytes_per_token for one in found.profile.layers[:-1]} == {4 * HIDDEN}
