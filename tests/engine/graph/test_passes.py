"""What reaches a graph shard is checked before the graphs, which read and write by address, are told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peerllm.engine.backends import Backends
from peerllm.engine.graph.graph_shard import GraphShard
from peerllm.engine.messages import Inspect
from peerllm.errors import EngineError
from peerllm.transport.frames.token_run import TokenRun
from tests.engine.architectures import stage
from tests.engine.runs import in_slot
from tests.engine.tiny import make_llama

SLOTS, CONTEXT = 4, 40
Load = Callable[..., GraphShard]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    path = make_llama(tmp_path_factory.mktemp("model"), hidden=64)
    backend = Backends()

    def one(first: int, last: int, quantize: str = "none") -> GraphShard:
        inspected = backend.inspect(Inspect(0, str(path), "float32", quantize))
        spec = replace(stage(inspected, first, last), slots=SLOTS, context=CONTEXT)
        shard = backend.load(spec, lambda done, total: None)
        assert isinstance(shard, GraphShard)
        return shard

    return one


def tokens(*ids: int) -> Any:
    return np.array(ids, np.int64)


WRONG: list[tuple[Any, list[TokenRun]]] = [
    (tokens(), []),
    (tokens(), [in_slot(1, 0, 0)]),
    (tokens(5), [in_slot(1, 0, -1)]),
    (tokens(5), [in_slot(1, -1, 1)]),
    (tokens(5), [in_slot(SLOTS, 0, 1)]),
    (tokens(5), [in_slot(-1, 0, 1)]),
    (tokens(5), [in_slot(1, 1, 1)]),
    (tokens(5, 5), [in_slot(1, 0, 1)]),
    (tokens(5), [in_slot(0, 3, 1), in_slot(1, 0, 1)]),
    (tokens(5, 5, 5), [in_slot(0, 3, 1), in_slot(1, 0, 1)]),
    (tokens(5, 5), [in_slot(0, 3, 1), in_slot(0, 3, 1)]),
    (tokens(5, 5, 5), [in_slot(1, 0, 1), in_slot(1, 0, 1), in_slot(3, 0, 1)]),
    (tokens(5, 5, 5), [in_slot(0, 3, 1), in_slot(1, 0, 2)]),
    (tokens(-1), [in_slot(0, 1, 1)]),
    (tokens(10**6), [in_slot(0, 1, 1)]),
    (tokens(5).astype(np.float32), [in_slot(0, 1, 1)]),
    (tokens(5).reshape(1, 1), [in_slot(0, 1, 1)]),
    (np.full(CONTEXT + 1, 5), [in_slot(1, 0, CONTEXT + 1)]),
    (np.full(CONTEXT, 5), [in_slot(0, 1, CONTEXT)]),
]


@pytest.mark.parametrize(("ids", "runs"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_pass_is_refused_and_moves_nothing(load: Load, ids: Any, runs: list[TokenRun]) -> None:
    shard = load(0, 5)
    shard.forward(tokens(5, 6, 7), [in_slot(0, 0, 3)])
    before = list(shard._slots._lengths)
    with pytest.raises(EngineError):
        shard.forward(ids, runs)
    assert shard._slots._lengths == before


@pytest.mark.parametrize(
    "hidden",
    [np.zeros((2, 64), np.float32), np.zeros((1, 65), np.float32), np.zeros((1, 64), np.float16),
     np.zeros(64, np.float32), np.zeros((1, 1, 64), np.float32)],
    ids=lambda hidden: f"{hidden.dtype} {hidden.shape}",
)  # fmt: skip
@pytest.mark.parametrize("first", [2, 5])
def test_hidden_states_of_another_shape_are_refused(load: Load, hidden: Any, first: int) -> None:
    with pytest.raises(EngineError, match="hidden states are float32"):
        load(first, 5).forward(hidden, [in_slot(0, 0, 1, True)])


def test_hidden_states_may_be_read_only_and_strided(load: Load) -> None:
    shard = load(2, 5)
    wide = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    strided = wide[::2, ::2]
    strided.flags.writeable = False
    expected = shard.forward(strided.copy(), [in_slot(0, 0, 3, True)])
    np.testing.assert_array_equal(shard.forward(strided, [in_slot(1, 0, 3, True)]), expected)


def test_a_closed_shard_computes_nothing(load: Load) -> None:
    shard = load(0, 5)
    shard.close()
    shard.close()
    with pytest.raises(EngineError):
        shard.forward(tokens(5), [in_slot(0, 0, 1, True)])


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_what_is_no_number_stays_with_its_sequence(load: Load, quantize: str) -> None:
    """In the room that a slot does not use, and in sequences beside it."""
    clean, poisoned = load(2, 5, quantize), load(2, 5, quantize)
    for store in poisoned._slots.stores.values():
        store[:] = np.nan
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((2, CONTEXT, 64)).astype(np.float32)
    for slot, length in enumerate((9, 30)):
        whole = [in_slot(slot, 0, length, True)]
        np.testing.assert_array_equal(
            clean.forward(rows[slot, :length], whole), poisoned.forward(rows[slot, :length], whole)
        )
    bad = np.full((1, 64), np.inf, np.float32)
    steps = [in_slot(1, 30, 1, True), in_slot(2, 0, 1, True), in_slot(0, 9, 1, True)]
    one = clean.forward(np.concatenate([rows[1, 30:31], rows[0, :1], rows[0, 9:10]]), steps)
    other = poisoned.forward(np.concatenate([rows[1, 30:31], bad, rows[0, 9:10]]), steps)
    np.testing.assert_array_equal(one[[0, 2]], other[[0, 2]])
    assert not np.isfinite(other[1]).any()
