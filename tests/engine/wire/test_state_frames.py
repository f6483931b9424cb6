"""State on its way to another device: what arrives is what was sent, and nothing else comes in."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peerllm.engine.base import StateForms, StatePart
from peerllm.engine.messages import LoadStage
from peerllm.engine.state.arriving_state import state_forms
from peerllm.engine.state.kv_slots import KVSlots
from peerllm.engine.state.state_kinds import LayerState, SequenceArray, TokenArray, keys_and_values
from peerllm.engine.wire.state_frames import (
    PART_BYTES,
    CarriedPart,
    from_state_frame,
    part_tokens,
    state_limits,
    to_state_frame,
)
from peerllm.errors import EngineError, PeerLLMError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.frame import FrameKind, NamedTensor
from peerllm.transport.frames.limits import FrameLimits, FrameRefused, Rule
from peerllm.transport.frames.token_run import TokenRun
from tests.engine.fakes import DEPLOYMENT, stage
from tests.sizes import FULL
from tests.transport.frames_support import encode

EXAMPLES = 3000 if FULL else 100
SLOTS, CONTEXT = 3, 50
STATES = {
    2: keys_and_values(2, 4, "float32"),
    3: keys_and_values(2, 4, "float16", 5),
    4: LayerState((TokenArray("keys", 2, 6, "bfloat16"), TokenArray("values", 2, 4, "bfloat16"))),
    5: LayerState((TokenArray("latent", 1, 10, "float32"),)),
    6: LayerState(),  # uses another block's
    7: LayerState((), (SequenceArray("recurrent", (2, 3, 4)), SequenceArray("convolution", (5,)))),
}
FORMS = state_forms(STATES, [range(2, 8)])
EVERY = {**FORMS.tokens, **FORMS.fixed}


def spec() -> LoadStage:
    return stage(1, stage=2, stages=3, epoch=4, slots=SLOTS, context=CONTEXT)


def limits(forms: StateForms = FORMS, form: str = "graph") -> FrameLimits:
    return state_limits(spec(), form, forms)


def frame(carried: CarriedPart, form: str = "graph") -> Any:
    return to_state_frame(carried, form, DEPLOYMENT, 4, 2)


@st.composite
def parts(draw: st.DrawFn) -> CarriedPart:
    block = draw(st.sampled_from(sorted(EVERY)))
    count = draw(st.integers(1, 9)) if block in FORMS.tokens else 1
    start = draw(st.integers(0, CONTEXT - count))
    random = np.random.default_rng(draw(st.integers(0, 9)))
    rows = {name: random.standard_normal((count, numbers)).astype(dtype)
            for name, (numbers, dtype) in EVERY[block].items()}  # fmt: skip
    return CarriedPart(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, SLOTS - 1)), StatePart(block, start, rows))


@given(parts())
def test_what_arrives_is_what_was_sent(sent: CarriedPart) -> None:
    came = from_state_frame(decode(encode(frame(sent)), limits()))
    assert (came.sequence, came.slot) == (sent.sequence, sent.slot)
    assert (came.part.block, came.part.start, came.part.length) == (sent.part.block, sent.part.start, sent.part.length)
    for name, rows in sent.part.rows.items():
        assert came.part.rows[name].dtype == rows.dtype
        assert came.part.rows[name].tobytes() == rows.tobytes()


def part(block: int = 2, start: int = 3, count: int = 4) -> CarriedPart:
    rows = {name: np.ones((count, numbers), dtype) for name, (numbers, dtype) in EVERY[block].items()}
    return CarriedPart(9, 1, StatePart(block, start, rows))


def tensor(name: str, dtype: str, *shape: int) -> NamedTensor:
    return NamedTensor.of(name, dtype, shape, bytes(int(np.prod(shape)) * (4 if dtype == "F32" else 2)))


GOOD = (tensor("graph.2.keys", "F32", 4, 8), tensor("graph.2.values", "F32", 4, 8))
WRONG = [
    ((tensor("torch.2.keys", "F32", 4, 8), tensor("torch.2.values", "F32", 4, 8)), Rule.NAME),
    ((tensor("graph.6.keys", "F32", 4, 8),), Rule.NAME),
    ((tensor("graph.1.keys", "F32", 4, 8),), Rule.NAME),
    ((tensor("graph.2.latent", "F32", 4, 8),), Rule.NAME),
    ((GOOD[0], GOOD[0]), Rule.NAME_TWICE),
    ((tensor("graph.2.keys", "F16", 4, 8), GOOD[1]), Rule.DTYPE),
    ((tensor("graph.2.keys", "F32", 4, 9), GOOD[1]), Rule.SHAPE),
    ((tensor("graph.2.keys", "F32", 5, 8), GOOD[1]), Rule.ROWS),
    ((tensor("graph.2.keys", "F32", 4, 2, 4), GOOD[1]), Rule.RANK),
]


@pytest.mark.parametrize(("tensors", "rule"), WRONG)
def test_only_rows_of_blocks_that_are_expected_come_in(tensors: tuple[NamedTensor, ...], rule: Rule) -> None:
    with pytest.raises(FrameRefused) as refused:
        decode(encode(replace(frame(part()), tensors=tensors)), limits())
    assert refused.value.rule is rule
    assert from_state_frame(decode(encode(replace(frame(part()), tensors=GOOD)), limits())).part.block == 2


RUN = TokenRun(9, 1, 3, 4)


@pytest.mark.parametrize(
    ("runs", "rule"),
    [
        ((replace(RUN, slot=SLOTS),), Rule.SLOT),
        ((replace(RUN, position=CONTEXT - 3),), Rule.CONTEXT),
        ((RUN, replace(RUN, slot=0)), Rule.RUNS),
        ((), Rule.NO_RUNS),
    ],
)
def test_only_tokens_that_fit_the_plan_come_in(runs: tuple[TokenRun, ...], rule: Rule) -> None:
    with pytest.raises(FrameRefused) as refused:
        decode(encode(replace(frame(part()), runs=runs)), limits())
    assert refused.value.rule is rule


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensors": (GOOD[0], tensor("graph.4.values", "BF16", 4, 8))},
        {"runs": (replace(RUN, sample=True),)},
        {"runs": (replace(RUN, snapshot=True),)},
        {"runs": (replace(RUN, length=0),), "tensors": ()},
    ],
)
def test_a_frame_is_rows_of_one_block_and_nothing_else(wrong: dict[str, Any]) -> None:
    with pytest.raises(PeerLLMError):
        from_state_frame(decode(encode(replace(frame(part()), **wrong)), limits()))


def test_no_other_stage_epoch_or_kind_is_meant() -> None:
    for change, rule in (
        ({"epoch": 5}, Rule.EPOCH), ({"stage": 1}, Rule.STAGE), ({"deployment": "cd" * 16}, Rule.DEPLOYMENT),
        ({"kind": FrameKind.ACTIVATION}, Rule.KIND),
    ):  # fmt: skip
        with pytest.raises(FrameRefused) as refused:
            decode(encode(replace(frame(part()), **change)), limits())
        assert refused.value.rule is rule


def test_frames_are_bounded_by_one_block_whatever_the_model() -> None:
    """Of a large model with 100 blocks, and of one whose tokens alone are larger than a part."""
    large = state_forms({block: keys_and_values(8, 128, "float16") for block in range(100)}, [range(100)])
    assert part_tokens(large) == PART_BYTES // (2 * 8 * 128 * 2)
    found = state_limits(stage(1, slots=8, context=8192), "graph", large)
    assert PART_BYTES < found.max_bytes < PART_BYTES + 1024
    huge = state_forms({0: keys_and_values(512, 128, "float32")}, [range(1)])
    assert part_tokens(huge) == 1
    found = state_limits(stage(1, slots=8, context=8192), "graph", huge)
    assert found.max_tokens == 1
    recurrent = state_forms({0: LayerState((), (SequenceArray("recurrent", (32, 128, 128)),))}, [range(1)])
    found = state_limits(stage(1, slots=8, context=8192), "graph", recurrent)
    assert 2 << 20 < found.max_bytes < (2 << 20) + 1024 and found.max_tokens == 1


def test_a_claim_of_more_takes_no_memory() -> None:
    data = bytearray(encode(frame(part())))
    found = limits()
    tracemalloc.start()
    for size in (2**32 - 1, 2**20):
        at = data.index(b"graph.2.keys") - 8
        data[at : at + 4] = size.to_bytes(4, "little")
        with pytest.raises(FrameRefused):
            decode(bytes(data), found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


def test_no_input_does_more_than_be_refused() -> None:
    """Through decoding, reading and taking in. Whatever is taken in lies within its slot."""
    outcomes: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None)
    @given(parts(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3), st.booleans())
    def check(sent: CarriedPart, changes: list[tuple[int, int]], cut: bool) -> None:
        data = bytearray(encode(frame(sent)))
        for at, value in changes:
            data[at % len(data)] = value
        slots = KVSlots(STATES, SLOTS, CONTEXT)
        try:
            came = from_state_frame(decode(bytes(data[:-8] if cut else data), limits()))
            slots.add(came.slot, came.part)
        except PeerLLMError as error:
            outcomes[type(error).__name__] += 1
            assert not any(store.any() for store in slots.stores.values())
        else:
            outcomes["taken in"] += 1
            others = [place for place in range(SLOTS) if place != came.slot]
            assert not any(store[others].any() for store in slots.stores.values())

    check()
    assert min(outcomes[one] for one in ("taken in", "FrameRefused", "BadInputError")) > EXAMPLES / 100, outcomes


def test_a_slot_in_use_takes_nothing() -> None:
    slots = KVSlots(STATES, SLOTS, CONTEXT)
    slots.seek([TokenRun(1, 1, 0, 2)])
    slots.advance([TokenRun(1, 1, 0, 2)])
    with pytest.raises(EngineError, match="holds a sequence"):
        slots.add(1, part(start=0).part)
