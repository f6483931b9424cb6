"""A slot's state taken to another shard: the sequence goes on there as it would have where it was."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch

from peerllm.engine import base
from peerllm.engine.backends import Backends
from peerllm.engine.base import Shard
from peerllm.engine.messages import Inspect, Inspected
from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_shard import TorchShard, load_shard
from peerllm.engine.state.exported_state import exported
from peerllm.errors import BadInputError, EngineError
from peerllm.planner.cost.layer_costs import kv_bytes
from tests.engine.architectures import FAMILIES, quiet, save, stage, tiny_model
from tests.engine.runs import in_slot

SLOTS, CONTEXT, SLACK, HEAD = 3, 60, 4, 5
WINDOW = 5  # of ministral's
# Keys and values of all tokens; of a window; of both; recurrent states beside them; the inputs of convolutions; all of
# that in one layer; latent vectors.
SLOW = [
    ("llama", "torch"), ("mistral", "torch"), ("falcon_h1", "torch"), ("granitemoehybrid", "torch"),
    ("qwen3_next", "torch"), ("deepseek_v3", "torch"), ("granitemoehybrid", "graph"),
]  # fmt: skip
FAST = [
    ("ministral", "torch"), ("lfm2", "torch"), ("llama", "graph"), ("mistral", "graph"), ("ministral", "graph"),
    ("ministral", "int8"), ("lfm2", "graph"), ("qwen3_next", "graph"), ("deepseek_v3", "graph"), ("qwen3_next", "int8"),
]  # fmt: skip
KINDS = [*FAST, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW)]


@pytest.fixture(autouse=True)
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", SLACK)


@lru_cache
def directory(model_type: str) -> Path:
    quiet()
    torch.set_num_threads(1)
    path = Path(mkdtemp())
    save(tiny_model(next(family for family in FAMILIES if family.model_type == model_type), 1.0, 0), path)
    return path


def inspected(model_type: str, engine: str) -> Inspected:
    if engine == "torch":
        return inspect_model(directory(model_type))
    return Backends().inspect(Inspect(0, str(directory(model_type)), "float32", engine.replace("graph", "none")))


def load(model_type: str, engine: str, first: int = 0, last: int = HEAD) -> Shard:
    spec = stage(inspected(model_type, engine), first, last, SLOTS, CONTEXT)
    shard = load_shard(spec) if engine == "torch" else Backends().load(spec, lambda done, total: None)
    assert isinstance(shard, TorchShard) is (engine == "torch")
    return shard


def states_of(shard: Any) -> Any:
    return shard.states if isinstance(shard, TorchShard) else shard._slots.states


def ids(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(3, 90, count)


def logits(shards: list[Shard], slot: int, position: int, tokens: Any) -> Any:
    rows = tokens
    for shard in shards:
        rows = shard.forward(rows, [in_slot(slot, position, len(tokens), sample=True)])
    return rows


def begun(shards: list[Shard], slot: int, seed: int = 1) -> int:
    """A prompt and some steps in a slot, beside others; tokens so far."""
    logits(shards, 0, 0, ids(5, 7))
    logits(shards, slot, 0, ids(13, seed))
    for position in range(13, 21):
        logits(shards, slot, position, ids(1, position))
    return 21


def same(some: Any, others: Any, shard: Shard) -> None:
    """Equal in every bit; but onnxruntime adds up a window in an order that follows from where in the room it lies."""
    if shard.reach is not None and shard.reach.room and not isinstance(shard, TorchShard):
        np.testing.assert_allclose(some, others, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(some, others)


@pytest.mark.parametrize(("model_type", "engine"), KINDS)
def test_a_sequence_goes_on_elsewhere(model_type: str, engine: str) -> None:
    here, there = load(model_type, engine), load(model_type, engine)
    length = begun([here], 1)
    position, arrays = here.export_state(1)
    wanted = exported(states_of(here), length)
    assert position == length
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == wanted
    begun([there], 2, seed=3)  # what was there is forgotten
    there.import_state(2, position, arrays)
    for step in range(6):
        one, other = (logits([a], slot, length + step, ids(1, 40 + step)) for a, slot in ((here, 1), (there, 2)))
        same(one, other, here)
    if here.reach is not None and here.reach.rewinds:  # as far as it could go back where it was
        back = length + 6 - SLACK
        one, other = (logits([a], slot, back, ids(2, 60)) for a, slot in ((here, 1), (there, 2)))
        same(one, other, here)


@pytest.mark.parametrize(("model_type", "engine"), [("qwen3_next", "graph"), ("ministral", "graph")])
def test_layers_change_their_shards(model_type: str, engine: str) -> None:
    """What two shards held goes to one, and half of it to a third."""
    two, one = [load(model_type, engine, 0, 2), load(model_type, engine, 3)], load(model_type, engine)
    length = begun(two, 1)
    arrays = {name: array for shard in two for name, array in shard.export_state(1)[1].items()}
    one.import_state(0, length, arrays)
    same(logits(two, 1, length, ids(1, 9)), logits([one], 0, length, ids(1, 9)), one)
    position, part = one.export_state(0, blocks=[2, 3])
    assert position == length + 1
    assert {name.partition(".")[0] for name in part} == {"2", "3"}
    for name, array in two[1].export_state(1)[1].items():
        same(part[name][:, -WINDOW + 1 :], array[:, -WINDOW + 1 :], one)  # what lies before need not be there
    with pytest.raises(EngineError, match="blocks \\[9\\]"):
        one.export_state(0, blocks=[2, 9])


@pytest.mark.parametrize(("model_type", "engine"), [("lfm2", "torch"), ("ministral", "graph")])
def test_a_state_that_does_not_fit_is_refused_and_moves_nothing(model_type: str, engine: str) -> None:
    here, there = load(model_type, engine), load(model_type, engine)
    length = begun([here], 1)
    arrays = here.export_state(1)[1]
    for shard, slot in ((here, 2), (there, 2)):
        logits([shard], slot, 0, ids(9, 5))
    name = next(iter(arrays))
    smaller = {key: array for key, array in arrays.items() if key != name}
    wrong: list[tuple[int, Any]] = [
        (length, smaller),
        (length, arrays | {"9.keys": arrays[name]}),
        (length, arrays | {name: arrays[name][..., :-1]}),
        (length, arrays | {name: arrays[name].astype(np.float64)}),
        (length + 40, arrays),
        (CONTEXT + 1, arrays),
        (0, arrays),
        (-1, arrays),
    ]
    for position, given in wrong:
        with pytest.raises(BadInputError):
            there.import_state(2, position, given)
    np.testing.assert_array_equal(logits([there], 2, 9, ids(1, 6)), logits([here], 2, 9, ids(1, 6)))


@pytest.mark.parametrize(("model_type", "engine"), [("lfm2", "torch"), ("qwen3_next", "graph"), ("ministral", "int8")])
def test_slots_take_what_was_promised_for_them_and_no_more(model_type: str, engine: str) -> None:
    """Snapshots included, once every slot has been full."""
    shard: Any = load(model_type, engine)
    promised = sum(kv_bytes(layer, SLOTS, CONTEXT) for layer in inspected(model_type, engine).profile.layers)
    assert shard.kv_bytes == promised
    for slot in range(SLOTS):
        shard.forward(ids(CONTEXT - 1, 1), [replace(in_slot(slot, 0, CONTEXT - 1), snapshot=True)])
        shard.forward(ids(1, 1), [in_slot(slot, CONTEXT - 1, 1)])
    assert held_bytes(shard) == promised


def held_bytes(shard: Any) -> int:
    """Bytes of the tensors that a shard's slots hold."""
    if not isinstance(shard, TorchShard):
        return shard._slots.nbytes
    found = []
    for cache in shard._caches:
        found += [*cache._fixed(), *cache._snapshot]
        for layer in cache._owned.values():
            found += [tensor for name in ("keys", "values") if (tensor := getattr(layer, name, None)) is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


@pytest.mark.parametrize(("model_type", "engine"), [("lfm2", "torch"), ("llama", "graph")])
def test_there_is_nothing_to_export_of_an_empty_slot(model_type: str, engine: str) -> None:
    with pytest.raises(EngineError, match="no state to export"):
        load(model_type, engine).export_state(1)


@pytest.mark.parametrize(("model_type", "engine"), [("lfm2", "torch"), ("lfm2", "graph")])
def test_a_sequence_that_begins_afresh_has_no_snapshot(model_type: str, engine: str) -> None:
    shard = load(model_type, engine)
    shard.forward(ids(9, 1), [replace(in_slot(1, 0, 9), snapshot=True)])
    logits([shard], 1, 9, ids(1, 2))
    logits([shard], 1, 9, ids(1, 2))  # at the snapshot
    logits([shard], 1, 0, ids(12, 3))
    with pytest.raises(EngineError, match="cannot go back"):
        logits([shard], 1, 9, ids(1, 2))
