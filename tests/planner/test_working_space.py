"""The working space of a pass: what it grows with, and the chunks that keep it small."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.planner.cost.working_space import MAX_CHUNK, MIN_CHUNK, SCORES_BYTES, chunk_tokens, working_bytes
from peerllm.types import WorkingSpace

SPACE = WorkingSpace(token=1000, pair=4, position=10, sequence=100, once=7, loading=0)


def test_a_pass_takes_what_its_tokens_pairs_positions_and_sequences_take() -> None:
    assert working_bytes(SPACE, 512, 2, 32) == 32 * 1000 + 32 * 4 * 512 + 512 * 10 + 2 * 100 + 7
    assert working_bytes(replace(SPACE, window=64), 512, 2, 32) == 32 * 1000 + 32 * 4 * 64 + 512 * 10 + 2 * 100 + 7
    assert working_bytes(replace(SPACE, window=600), 512, 2, 32) == working_bytes(SPACE, 512, 2, 32)


def test_a_step_of_all_slots_may_be_the_largest_pass() -> None:
    assert working_bytes(SPACE, 512, 33, 32) == 33 * 1000 + 33 * 4 * 512 + 512 * 10 + 33 * 100 + 7


def test_loading_and_passes_do_not_happen_at_once() -> None:
    passing = working_bytes(SPACE, 512, 2, 32)
    assert working_bytes(replace(SPACE, loading=passing - 7), 512, 2, 32) == passing
    assert working_bytes(replace(SPACE, loading=passing), 512, 2, 32) == passing + 7


def test_chunks_are_as_large_as_scores_context_and_the_default_allow() -> None:
    assert chunk_tokens(SPACE, 512) == MAX_CHUNK == working_chunk(SPACE, 512)
    assert chunk_tokens(SPACE, 100) == 100
    assert chunk_tokens(SPACE, 5) == MIN_CHUNK
    wide = replace(SPACE, pair=SCORES_BYTES // (100 * 512))
    assert chunk_tokens(wide, 512) == 100 == working_chunk(wide, 512)
    assert chunk_tokens(replace(wide, window=256), 512) == MAX_CHUNK
    assert chunk_tokens(replace(SPACE, pair=SCORES_BYTES), 512) == MIN_CHUNK
    assert chunk_tokens(replace(SPACE, pair=0), 512) == MAX_CHUNK


def working_chunk(space: WorkingSpace, context: int) -> int:
    """The chunk that `working_bytes` reckons with if it is told none."""
    free = replace(space, pair=0, position=0, sequence=0, once=0)
    chunk = chunk_tokens(space, context)
    assert working_bytes(replace(space, once=0), context, 1) == working_bytes(replace(space, once=0), context, 1, chunk)
    return working_bytes(free, context, 1, chunk) // space.token


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
     (12_345_678, "12.3 MB"), (-5e9, "-5.00 GB"), (2e16, "20000 TB")],
)  # fmt: skip
def test_sizes_have_three_digits_and_a_unit(nbytes: float, text: str) -> None:
    assert human_bytes(nbytes) == text
