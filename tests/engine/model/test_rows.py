"""Gemma 3n and Gemma 4: what the planner is told of them, and what travels from shard to shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerllm.engine.backends import Backends
from peerllm.engine.graph.graph_shard import GraphShard
from peerllm.engine.messages import Inspected, TimeLayers
from peerllm.engine.model.torch_backend import TorchBackend
from tests.engine.architectures import CONTEXT, FAMILIES, VOCABULARY, cuts, inspect, load, save, tiny_model
from tests.engine.runs import in_slot

HIDDEN, EACH, BLOCKS, STREAMS = 32, 8, 7, 3
UNITS = (range(0, 1), range(1, 2), range(2, 3), range(3, 7))
IDS = np.array([3, 5, 7, 11, 13, 17, 19, 23, 29])
GEMMA4 = "Gemma 4 (shared keys)"
SUBJECTS = [(GEMMA4, Backends), (GEMMA4, TorchBackend), ("Gemma 3n (text)", TorchBackend)]

pytestmark = pytest.mark.usefixtures("calm")


@dataclass(frozen=True)
class Subject:
    """A tiny model on disk, and what computes it."""

    name: str
    directory: Path
    backend: Any

    def inspect(self, quantize: str = "none") -> Inspected:
        return inspect(self.directory, self.backend, quantize)

    def load(self, *cut: tuple[int, int], quantize: str = "none") -> list[Any]:
        return load(self.inspect(quantize), cut, self.backend)


@pytest.fixture(scope="module", params=SUBJECTS, ids=lambda one: f"{one[0]} by {one[1].__name__}")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name, backend = request.param
    directory = tmp_path_factory.mktemp("model")
    save(tiny_model(next(family for family in FAMILIES if family.name == name), 1.0, 0), directory)
    return Subject(name, directory, backend())


def widths(name: str) -> list[int]:
    """Of the rows that each layer but the head hands on."""
    streams = STREAMS if "3n" in name else 1
    return [streams * HIDDEN + EACH * (BLOCKS - done) for done in (0, *(unit.stop for unit in UNITS))]


def forward(shards: Any, rows: Any = IDS) -> Any:
    for shard in shards:
        rows = shard.forward(rows, [in_slot(0, 0, len(IDS), True)])
    return rows


def test_blocks_that_share_keys_and_values_are_one_layer(model: Subject) -> None:
    found = model.inspect()
    _, *blocks, _ = layers = found.profile.layers
    assert [one.name for one in layers] == ["embedding", "block 0", "block 1", "block 2", "blocks 3 to 6", "head"]
    assert [one.output_bytes_per_token for one in layers[:-1]] == [4 * width for width in widths(model.name)]
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
    kept = min(blocks[0].kv_window_tokens or 0, found.max_context)
    assert blocks[3].state_bytes_per_sequence == blocks[0].kv_bytes_per_token * kept
    assert len({one.kind for one in blocks}) == 3 or "3n" in model.name


def test_rows_hold_what_later_blocks_need_and_nothing_else(model: Subject) -> None:
    shards = model.load((0, 0), (1, 2), (3, 4), (5, 5))
    rows = [shards[0].forward(IDS, [in_slot(0, 0, len(IDS))])]
    for shard in shards[1:3]:
        assert rows[-1].shape[1] == shard.hidden_size
        rows.append(shard.forward(rows[-1], [in_slot(0, 0, len(IDS))]))
    assert [one.shape[1] for one in rows] == [widths(model.name)[layer] for layer in (0, 2, 4)]
    assert max(shard.hidden_size for shard in shards) == shards[0].hidden_size == widths(model.name)[0]
    passed = rows[0][:, -EACH * 5 :]  # through blocks 0 and 1 go the inputs of the five others
    np.testing.assert_array_equal(rows[1][:, -EACH * 5 :], passed)
    whole = forward(shards)
    for block in (0, 4, 6):  # a control: every block reads its own
        other = rows[0].copy()
        start = other.shape[1] - EACH * (BLOCKS - block)
        other[:, start : start + EACH] += 1.0
        assert np.abs(forward(shards[1:], other) - whole).max() > 1e-3, block


def test_the_table_of_inputs_stays_in_its_file(model: Subject) -> None:
    table, embedding = (numbers * VOCABULARY * 4 for numbers in (BLOCKS * EACH, HIDDEN))
    for quantize in ("none", "int8"):
        found = model.inspect(quantize)
        (shard,) = model.load((0, 0), quantize=quantize)
        assert 0 < shard.weight_bytes <= found.profile.layers[0].memory_bytes
        mapped = table + (embedding if quantize == "int8" or isinstance(shard, GraphShard) else 0)
        assert sum(tensor.nbytes for tensor in found.tensors[0]) - shard.weight_bytes >= mapped


def test_a_sequence_can_go_back_though_some_blocks_keep_nothing(model: Subject) -> None:
    (shard,) = model.load((0, 5))
    assert shard.reach is not None and shard.reach.rewinds
    whole = forward([shard])
    shard.forward(IDS[4:], [in_slot(0, 4, 5, True)])
    again = shard.forward(IDS[-1:], [in_slot(0, 8, 1, True)])
    np.testing.assert_allclose(again, whole, atol=1e-5)


def test_rounded_weights_say_nearly_the_same_at_every_cut(model: Subject) -> None:
    exact, whole = (forward(model.load((0, 5), quantize=quantize)) for quantize in ("none", "int8"))
    assert 0 < np.linalg.norm(whole - exact) < 0.2 * np.linalg.norm(exact)
    for cut in cuts(6, 2) if isinstance(model.backend, Backends) else [((0, 2), (3, 5))]:
        np.testing.assert_allclose(forward(model.load(*cut, quantize="int8")), whole, atol=1e-4)


def test_layers_are_timed_in_rows_of_their_own_width(model: Subject) -> None:
    found = model.inspect()
    message = TimeLayers(1, found.config, "float32", 1 << 31)
    timed = model.backend.time_layers(message, lambda: None)
    assert {one.kind for one in found.profile.layers} <= timed.layer_ms.keys()
    assert not timed.skipped


def test_what_is_promised_for_keys_and_values_is_what_is_taken(model: Subject) -> None:
    found = model.inspect()
    unit = found.profile.layers[4]
    (shard,) = model.load((4, 4))
    window = found.profile.layers[1]
    kept = min(CONTEXT, window.kv_window_tokens or 0) * window.kv_bytes_per_token
    assert shard.kv_bytes == 3 * (CONTEXT * unit.kv_bytes_per_token + kept)


def test_other_models_have_rows_of_hidden_states_alone(tmp_path: Path) -> None:
    save(tiny_model(next(family for family in FAMILIES if family.name == "Gemma 4 (dense)"), 1.0, 0), tmp_path)
    for backend in (Backends(), TorchBackend()):
        found = inspect(tmp_path, backend)
        assert not found.mixed_rows
        assert {one.output_bytes_per_token for one in found.profile.layers[:-1]} == {4 * HIDDEN}
