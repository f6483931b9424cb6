"""What is loaded and promised where: shards that are used again are found, and sums never fall below what is held."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.daemon.control_messages import Holding
from peerllm.daemon.decide.holdings import HouseholdHoldings, ShardTable
from peerllm.daemon.decide.ledger import EpochSum
from peerllm.reused_layers import reused
from tests.sizes import examples

D, A, B = "d" * 32, "a" * 64, "b" * 64
SIZE = (2, 64)
LAYERS = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda ends: (min(ends), max(ends)))


@given(LAYERS, st.lists(LAYERS, max_size=6))
@settings(max_examples=examples(300))
def test_what_is_reused_and_what_is_missing_make_up_a_stage(stage, loaded):
    used, missing = reused(stage, loaded)
    parts = sorted([*used, *missing])
    assert [layer for first, last in parts for layer in range(first, last + 1)] == [*range(stage[0], stage[1] + 1)]
    assert set(used) <= set(loaded)
    for first, last in missing:
        left = range(first, last + 1)
        assert not any(left.start <= one[0] and one[1] < left.stop for one in loaded), "it could have been reused"


@given(
    st.lists(st.tuples(st.frozensets(st.integers(0, 12), min_size=1), st.booleans(), st.integers(0, 4)), max_size=12)
)
@settings(max_examples=examples(300))
def test_a_sum_is_never_less_than_what_the_epochs_hold_together(history):
    """Epochs as sets of layers of one byte each: they come one after another, and end in any order."""
    total, standing = EpochSum(), dict[int, frozenset[int]]()
    for number, (layers, whole, ended) in enumerate(history):
        there, before = frozenset().union(*standing.values()), total.nbytes
        total.add(number, len(layers), None if whole and not standing else len(layers - there))
        standing[number] = layers
        if ended in standing:
            total.end(ended, ended)
            del standing[ended]
            assert ended != number or total.nbytes == before, "given up at once, it leaves nothing behind"
        held = frozenset().union(*standing.values())
        assert len(held) <= total.nbytes <= sum(map(len, standing.values()))
        if len(standing) == 1:
            assert total.nbytes == len(held), "all of it once the earlier ones are released, and no more"
    assert bool(total) == bool(standing)


def test_shards_stay_as_long_as_an_epoch_uses_them():
    table = ShardTable()
    table.load(1, (0, 3), SIZE)
    table.load(1, (8, 9), SIZE)
    table.load(2, (0, 5), SIZE)
    assert table.of(SIZE) == [(0, 3), (4, 5), (8, 9)] and table.of((4, 64)) == []
    assert table.holdings(D) == (
        Holding(D, 2, 0, 3, *SIZE), Holding(D, 2, 4, 5, *SIZE), Holding(D, 1, 8, 9, *SIZE),
    )  # fmt: skip
    table.end(0, 1)
    assert table.of(SIZE) == [(0, 3), (4, 5)]
    table.load(3, (0, 3), SIZE)
    table.end(2, 2)
    assert table.of(SIZE) == [(0, 3)] and table.epochs == {3}


def test_a_coordinator_believes_what_devices_say_of_themselves():
    household = HouseholdHoldings()
    household.promise(A, 1, 100, 100)
    household.load(A, 1, (0, 3), SIZE)
    household.promise(A, 2, 120, 30)
    assert household.promised_bytes(A) == 130 and household.of_before(2) == {A} and not household.of_before(1)
    assert household.size == SIZE and household.layers(A, SIZE) == {0, 1, 2, 3}
    household.told(A, [Holding(D, 1, 0, 1, *SIZE)])
    assert household.layers(A, SIZE) == {0, 1} and household.promised_in(A, 1)
    household.end(A, 1)
    assert household.promised_bytes(A) == 120 and not household.promised_in(A, 1) and household.devices == {A}
    household.lost(A)
    household.told(B, [])
    assert not household.devices and household.size == (0, 0) and household.shards(B, SIZE) == []
