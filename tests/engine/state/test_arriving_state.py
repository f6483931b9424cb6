"""A sequence's state taken to another shard in parts, while the sequence goes on where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine import base
from peerllm.engine.backends import Backends
from peerllm.engine.base import Shard, StatePart
from peerllm.engine.messages import Inspect, Inspected
from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_shard import TorchShard, load_shard
from peerllm.engine.state.arriving_state import ArrivingSlot
from peerllm.engine.state.kv_slots import KVSlots
from peerllm.engine.state.state_kinds import LayerState, SequenceArray, keys_and_values, reach_of
from peerllm.errors import BadInputError, EngineError
from peerllm.planner.cost.layer_costs import kv_bytes
from tests.engine.architectures import FAMILIES, quiet, save, stage, tiny_model
from tests.engine.runs import in_slot
from tests.sizes import examples

SLOTS, CONTEXT, SLACK, HEAD = 3, 60, 4, 5
WINDOW = 5  # of ministral's
# Keys and values of all tokens and of a window; rounded to 16 bits; latent vectors.
FAST = [("ministral", "torch"), ("ministral", "graph")]
# Convolutions and recurrent states, beside attention or alone.
RECURRENT = [
    ("lfm2", "graph"), ("qwen3_next", "graph"), ("qwen3_next", "int8"),
    pytest.param("granitemoehybrid", "graph", marks=pytest.mark.slow),
]  # fmt: skip
SLOW = [
    ("llama", "torch"), ("mistral", "torch"), ("deepseek_v3", "torch"), ("llama", "graph"), ("mistral", "graph"),
    ("ministral", "int8"), ("deepseek_v3", "graph"),
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


def ids(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(3, 90, count)


def logits(shards: list[Shard], slot: int, position: int, tokens: Any) -> Any:
    rows = tokens
    for shard in shards:
        rows = shard.forward(rows, [in_slot(slot, position, len(tokens), sample=True)])
    return rows


def same(some: Any, others: Any, shard: Shard) -> None:
    """Equal in every bit; but onnxruntime adds up a window in an order that follows from where in the room it lies."""
    if shard.reach is not None and shard.reach.room and not isinstance(shard, TorchShard):
        np.testing.assert_allclose(some, others, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(some, others)


@dataclass
class Steps:
    """Sequences on a shard; token `position` of each is always the same."""

    shard: Shard
    lengths: dict[int, int] = field(default_factory=dict)

    def go(self, slot: int, count: int = 1) -> Any:
        start = self.lengths.get(slot, 0)
        self.lengths[slot] = start + count
        return logits([self.shard], slot, start, ids(CONTEXT, slot)[start : start + count])

    def together(self, *slots: int) -> None:
        """One step of several sequences, for which slots may change their places."""
        runs = [in_slot(slot, self.lengths[slot], 1, sample=True) for slot in slots]
        self.shard.forward(np.array([ids(CONTEXT, slot)[self.lengths[slot]] for slot in slots]), runs)
        self.lengths |= {slot: self.lengths[slot] + 1 for slot in slots}


def carry(here: Shard, slot: int, there: Shard, to: int, most: int, until: int, between: Callable[[], object]) -> None:
    """Every block's rows up to token `until`, at most `most` tokens at once."""
    for block in here.state_forms(0, HEAD).tokens:
        start = 0
        while start < until:
            start = max(start, here.held(slot, block).start)  # a window forgets while the sequence goes on
            stop = min(start + most, until)
            there.import_part(to, here.export_part(slot, block, start, stop))
            start = stop
            between()


@pytest.mark.parametrize("most", [3, 60])
@pytest.mark.parametrize(("model_type", "engine"), KINDS)
def test_a_sequence_goes_on_where_its_state_was_carried(model_type: str, engine: str, most: int) -> None:
    """It goes on here meanwhile, and others step there, so that windows slide and slots change their places."""
    here, there = Steps(load(model_type, engine)), Steps(load(model_type, engine))
    here.go(1, 17)
    there.go(0, 4)
    there.go(2, 4)

    def between() -> None:
        if here.lengths[1] < 17 + SLACK:
            here.go(1)
        if there.lengths[2] < 30:
            there.together(0, 2)

    carry(here.shard, 1, there.shard, 1, most, 17, between)
    assert there.shard.settle(1)[0] == 17
    there.lengths[1] = 17
    while there.lengths[1] < here.lengths[1]:
        there.go(1)
    for _ in range(6):
        same(here.go(1), there.go(1), here.shard)
    undisturbed = Steps(load(model_type, engine))
    for slot in (0, 2):
        undisturbed.go(slot, there.lengths[slot])
        np.testing.assert_allclose(undisturbed.go(slot), there.go(slot), rtol=1e-3, atol=1e-4)
    with pytest.raises(EngineError, match="holds a sequence"):
        there.shard.import_part(1, here.shard.export_part(1, 0, here.lengths[1] - 1, here.lengths[1]))


def take(here: Shard, slot: int, there: Shard, to: int, position: int) -> None:
    """All that a recurrent model keeps after `position` tokens."""
    forms = here.state_forms(0, HEAD)
    for block in forms.tokens:
        there.import_part(to, here.export_part(slot, block, here.held(slot, block).start, position))
    for block in forms.fixed:
        there.import_part(to, here.export_fixed(slot, block, position))


@pytest.mark.parametrize(("model_type", "engine"), RECURRENT)
def test_recurrent_states_go_as_they_are_at_the_end_or_at_the_snapshot(model_type: str, engine: str) -> None:
    here, there = load(model_type, engine), load(model_type, engine)
    tokens = ids(CONTEXT, 1)
    assert here.steady(1) == 0
    here.forward(tokens[:12], [replace(in_slot(1, 0, 12), snapshot=True)])
    for position in range(12, 20):
        logits([here], 1, position, tokens[position : position + 1])
    assert here.steady(1) == 12
    for slot, position in ((2, 20), (0, 12)):
        logits([there], slot, 0, ids(5, 9))  # what was there is forgotten
        there.release(slot)
        take(here, 1, there, slot, position)
        assert there.settle(slot) == (position, position)
    for position in range(20, 26):
        same(*(logits([shard], slot, position, tokens[position : position + 1]) for shard, slot in
               ((here, 1), (there, 2))), here)  # fmt: skip
    for position in range(12, 26):  # from the snapshot
        logits([there], 0, position, tokens[position : position + 1])
    same(*(logits([there], slot, 26, tokens[26:27]) for slot in (0, 2)), there)


def test_a_recurrent_state_is_of_one_place_in_all_blocks() -> None:
    here, there = load("lfm2", "graph"), load("lfm2", "graph")
    tokens = ids(CONTEXT, 1)
    here.forward(tokens[:12], [replace(in_slot(1, 0, 12), snapshot=True)])
    logits([here], 1, 12, tokens[12:15])
    forms = here.state_forms(0, HEAD)
    last = list(forms.fixed)[-1]
    for position, wrong in ((15, 12), (12, 15)):
        take(here, 1, there, 1, position)
        there.import_part(1, here.export_fixed(1, last, wrong))
        assert there.settle(1) == (0, 0)
        same(logits([there], 1, 0, tokens[:9]), logits([here], 2, 0, tokens[:9]), here)  # nothing is left of it
        there.release(1)
        here.release(2)
    for position in (0, 13, 16):
        with pytest.raises(EngineError, match="no state after"):
            here.export_fixed(1, last, position)


@pytest.mark.parametrize(("model_type", "engine"), [("ministral", "torch"), ("ministral", "graph")])
def test_what_came_since_may_follow_and_the_least_counts(model_type: str, engine: str) -> None:
    here, there = Steps(load(model_type, engine)), Steps(load(model_type, engine))
    here.go(1, 17)
    carry(here.shard, 1, there.shard, 2, 60, 17, lambda: None)
    here.go(1, 8)
    blocks = list(here.shard.state_forms(0, HEAD).tokens)
    for block in blocks[:-1]:
        there.shard.import_part(2, here.shard.export_part(1, block, 17, 25))
    there.shard.import_part(2, here.shard.export_part(1, blocks[-1], 17, 22))
    there.shard.import_part(2, here.shard.export_part(1, blocks[-1], 20, 24))  # some of it again
    assert there.shard.settle(2)[0] == 24
    for block in blocks:
        both = range(max(shard.held(slot, block).start for shard, slot in ((here.shard, 1), (there.shard, 2))), 24)
        one, other = (shard.export_part(slot, block, both.start, 24).rows
                      for shard, slot in ((here.shard, 1), (there.shard, 2)))  # fmt: skip
        assert len(both) > WINDOW and all((one[name] == other[name]).all() for name in one)
    tokens = ids(CONTEXT, 1)
    for position in range(24, 30):
        same(*(logits([one], slot, position, tokens[position : position + 1]) for one, slot in
               ((here.shard, 1), (there.shard, 2))), here.shard)  # fmt: skip


@pytest.mark.parametrize(("model_type", "engine"), [("ministral", "torch"), ("ministral", "graph")])
def test_nothing_is_held_until_every_block_has_its_rows(model_type: str, engine: str) -> None:
    here, there = load(model_type, engine), load(model_type, engine)
    logits([here], 1, 0, ids(17, 1))
    *most, last = here.state_forms(0, HEAD).tokens
    for block in most:
        there.import_part(1, here.export_part(1, block, here.held(1, block).start, 17))
    assert there.settle(1) == (0, 0)
    there.import_part(1, here.export_part(1, last, here.held(1, last).start, 17))
    assert there.settle(1) == (0, 0), "what was settled is forgotten"
    logits([there], 1, 0, ids(17, 1))
    same(*(logits([shard], 1, 17, ids(1, 2)) for shard in (here, there)), here)


@pytest.mark.parametrize(("model_type", "engine"), [("ministral", "torch"), ("ministral", "graph")])
def test_a_sequence_that_begins_afresh_takes_nothing_over(model_type: str, engine: str) -> None:
    here, there = load(model_type, engine), load(model_type, engine)
    logits([here], 1, 0, ids(9, 1))
    for begins in (lambda: logits([there], 1, 0, ids(3, 5)), lambda: None):
        carry(here, 1, there, 1, 60, 9, lambda: None)
        begins()
        there.release(1)
        with pytest.raises(EngineError, match="nothing has arrived"):
            there.settle(1)


@pytest.mark.parametrize(("model_type", "engine"), [("ministral", "torch"), ("ministral", "graph")])
def test_rows_that_are_not_held_are_not_exported(model_type: str, engine: str) -> None:
    shard = load(model_type, engine)
    logits([shard], 1, 0, ids(40, 1))
    starts = {block: shard.held(1, block).start for block in shard.state_forms(0, HEAD).tokens}
    assert 0 in starts.values() and max(starts.values()) > 0
    for block, start in starts.items():
        for wrong in ((start - 1, 40), (39, 41), (40, 41), (39, 39), (39, 38), (-1, 40)):
            with pytest.raises(EngineError):
                shard.export_part(1, block, *wrong)


def test_recurrent_shards_in_torch_are_not_carried() -> None:
    forms = load("lfm2", "torch").state_forms(0, HEAD)
    assert not forms.tokens and not forms.fixed


def test_only_the_blocks_of_some_layers_are_named() -> None:
    shard = load("ministral", "graph")
    assert list(shard.state_forms(0, HEAD).tokens) == [0, 1, 2, 3]
    assert list(shard.state_forms(0, 1).tokens) == [0] and list(shard.state_forms(2, 3).tokens) == [1, 2]
    assert list(shard.state_forms(HEAD, HEAD).tokens) == [] == list(shard.state_forms(0, 0).tokens)


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


@pytest.mark.parametrize(("model_type", "engine"), [("lfm2", "torch"), ("lfm2", "graph")])
def test_a_sequence_that_begins_afresh_has_no_snapshot(model_type: str, engine: str) -> None:
    shard = load(model_type, engine)
    shard.forward(ids(9, 1), [replace(in_slot(1, 0, 9), snapshot=True)])
    logits([shard], 1, 9, ids(1, 2))
    logits([shard], 1, 9, ids(1, 2))  # at the snapshot
    logits([shard], 1, 0, ids(12, 3))
    with pytest.raises(EngineError, match="cannot go back"):
        logits([shard], 1, 9, ids(1, 2))


# ---- without a model ------------------------------------------------------------------------------------------------

STATES = {3: keys_and_values(2, 4, "float32"), 4: keys_and_values(2, 4, "float32", 5)}


def part(block: int, start: int, count: int, names: tuple[str, ...] = ("keys", "values"), **form: Any) -> StatePart:
    numbers = np.arange(start, start + count)[:, None] + np.zeros(form.get("width", 8))
    return StatePart(block, start, {name: numbers.astype(form.get("dtype", "float32")) for name in names})


WRONG = [
    part(5, 0, 2), part(3, 0, 2, ("keys",)), part(3, 0, 2, ("keys", "values", "latent")), part(3, 0, 2, width=7),
    part(3, 0, 2, width=16), part(3, 0, 2, dtype="float16"), part(3, 0, 0), part(3, 5, 2), part(3, 0, CONTEXT + 1),
    part(3, -1, 2), part(4, CONTEXT, 1), part(4, CONTEXT - 1, 2), part(4, 0, 5 + 2 * SLACK + 1),
    StatePart(3, 0, {"keys": np.zeros((2, 8), "float32"), "values": np.zeros((3, 8), "float32")}),
    StatePart(3, 0, {"keys": np.zeros((2, 2, 4), "float32"), "values": np.zeros((2, 8), "float32")}),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_part_that_does_not_fit_changes_nothing(wrong: StatePart) -> None:
    slots = KVSlots(STATES, 2, CONTEXT)
    for block in STATES:
        slots.add(1, part(block, 0, 4))
    before = {name: store.copy() for name, store in slots.stores.items()}
    with pytest.raises(BadInputError):
        slots.add(1, wrong)
    assert all((store == before[name]).all() for name, store in slots.stores.items())
    assert slots.settle(1) == (4, 4)


JUMPS = st.sampled_from([0, 0, 0, 0, 0, 0, -3, 2, 17])  # from where the block's last part ended


@settings(max_examples=examples(300))
@given(st.lists(st.tuples(st.sampled_from(sorted(STATES)), JUMPS, st.integers(1, 8)), max_size=25))
def test_every_row_is_its_tokens_whatever_arrives_in_whatever_order(parts: list[tuple[int, int, int]]) -> None:
    """The number in each row is its token's position. What counts as held lies there, and is enough for the windows."""
    slots, arriving = KVSlots(STATES, 1, CONTEXT), ArrivingSlot(STATES, CONTEXT)
    stops = {block: 0 for block in STATES}
    for block, jump, count in parts:
        start = max(0, stops[block] + jump)
        try:
            arriving.place(part(block, start, count))
        except BadInputError:
            with pytest.raises(BadInputError):
                slots.add(0, part(block, start, count))
            assert start + count > CONTEXT or (block == 3 and start > stops[3])
        else:
            slots.add(0, part(block, start, count))
            stops[block] = start + count
    tokens, furthest = slots.settle(0) if any(stops.values()) else (0, 0)
    assert tokens in (0, min(stops.values()))
    for position in range(1, tokens):
        if reach_of(STATES.values()).allows(position, furthest):
            slots.check([in_slot(0, position, 1)])
    for block in STATES if tokens else ():
        held = slots.held(0, block)
        assert held.stop == tokens and len(held) >= STATES[block].seen(tokens)
        for rows in slots.part(0, block, held.start, tokens).rows.values():
            assert (rows == np.arange(held.start, tokens)[:, None]).all()


def test_rows_change_their_place_with_their_slot() -> None:
    """Slots 0 and 2 step together, for which the slot between them, still empty, makes room."""
    slots = KVSlots(STATES, 3, CONTEXT)
    slots.add(1, part(3, 0, 6))
    slots.seek(runs := [in_slot(0, 0, 1), in_slot(2, 0, 1)])
    slots.advance(runs)
    for block, start in ((3, 6), (4, 0)):
        slots.add(1, part(block, start, 8 - start))
    assert slots.settle(1) == (8, 8)
    for rows in slots.part(1, 3, 0, 8).rows.values():
        assert (rows == np.arange(8)[:, None]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        part(0, 3, 1), part(0, 3, 2, ("recurrent",)), part(0, 3, 1, ("recurrent",), width=5),
        part(0, 3, 1, ("recurrent", "keys")), part(0, CONTEXT, 1, ("recurrent",)), part(0, -1, 1, ("recurrent",)),
    ],
)  # fmt: skip
def test_what_is_kept_once_is_one_row(wrong: StatePart) -> None:
    slots = KVSlots({0: LayerState((), (SequenceArray("recurrent", (2, 4)),))}, 1, CONTEXT)
    slots.add(0, part(0, 3, 1, ("recurrent",)))
    with pytest.raises(BadInputError):
        slots.add(0, wrong)
    assert slots.settle(0) == (4, 4)
    assert (slots.fixed_part(0, 0, 4).rows["recurrent"] == 3).all()
