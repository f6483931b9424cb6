"""Hidden states as int8 between engines: how far off they may be, what is refused, what it saves on the link."""

from __future__ import annotations

import asyncio
import math
import struct
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peerllm.engine.base import Tensor
from peerllm.engine.messages import LoadStage, Record, Recorded, Span
from peerllm.engine.model.torch_shard import load_shard
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.epoch_ring import StageKey
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.wire.parcels import (
    DTYPES,
    Opened,
    Parcel,
    TokenBatch,
    dequantised,
    from_frame,
    quantised,
    stage_limits,
    to_frame,
)
from peerllm.engine.wire.quantised import dequantise, quantise
from peerllm.errors import FrameError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.frame import Frame, NamedTensor
from peerllm.transport.frames.limits import FrameRefused, Rule
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling
from tests.engine.engines import WAIT_S, Cut, Deployed, deploy, devices, stage_specs
from tests.engine.fakes import DEPLOYMENT, stage
from tests.engine.runs import in_slot, sequences
from tests.engine.tiny import make_llama, prompt
from tests.transport.frames_support import encode

pytestmark = pytest.mark.timeout(240)

HALF = {name: DTYPES[name] for name in ("bfloat16", "float16")}
RING: Cut = ((0, 0, 2), (1, 3, 4), (0, 5, 5))  # the head back on the source: both hops carry hidden states


@st.composite
def hidden_states(draw: st.DrawFn) -> Tensor:
    """[n, hidden] in 16 bits: any finite numbers, with outliers, rows of zeros and numbers hardly above zero."""
    dtype = HALF[draw(st.sampled_from(sorted(HALF)))]
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    most = draw(st.sampled_from([1e-40, 1e-7, 1.0, 300.0, 6e4]))
    numbers = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-3])
    flat = draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))
    return (np.array(flat) * most).reshape(rows, width).astype(dtype)


@given(hidden_states())
def test_what_comes_back_is_half_a_step_off_at_most(hidden: Tensor) -> None:
    values, scales = quantise(hidden)
    assert values.dtype == np.int8 and np.abs(values).max() <= 127 and (scales > 0).all()
    step, exact = scales.astype(float)[:, None], hidden.astype(float)
    off = np.abs(exact - dequantise(values, scales, DTYPES["float32"]).astype(float))
    assert (off <= step / 2 * (1 + 1e-5)).all()
    off = np.abs(exact - dequantise(values, scales, hidden.dtype).astype(float))
    assert (off <= step * (1 + 1e-5)).all()  # the nearest number there is can be as far off again
    assert np.array_equal(quantise(hidden[:1])[0], values[:1]), "a row is right by itself"


@given(hidden_states())
def test_the_wire_changes_nothing_of_it(hidden: Tensor) -> None:
    parcel, lost = quantised(activation(hidden))
    assert parcel is not None and not lost
    (came,) = from_frame(decode(encode(to_frame(parcel, DEPLOYMENT, 1, 1)), limits(hidden.shape[1])))
    assert isinstance(came, TokenBatch) and came.scales is not None
    assert np.array_equal(came.rows, parcel.rows) and np.array_equal(came.scales, parcel.scales)
    whole = dequantised(came, hidden.dtype)
    assert whole.rows.dtype == hidden.dtype
    assert whole.rows.shape == hidden.shape and whole.runs == tuple(parcel.runs)


def activation(hidden: Tensor) -> TokenBatch:
    return TokenBatch([TokenRun(n + 1, n, 5, 1, True) for n in range(hidden.shape[0])], hidden)


def spec(**changes: Any) -> LoadStage:
    """The second of two stages, which takes int8."""
    told = {
        "stage": 1,
        "stages": 2,
        "dtype": "bfloat16",
        "slots": 64,
        "micro_batch": 64,
        "upstream_activations": "int8",
    }
    return stage(1, **told | changes)


def limits(width: int, **changes: Any) -> Any:
    return stage_limits(spec(**changes), width)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_left_out_and_no_others(bad: float) -> None:
    hidden = np.random.default_rng(1).standard_normal((7, 8)).astype(HALF["bfloat16"])
    hidden[3, 5] = bad
    runs = [TokenRun(1, 0, 0, 2, False), TokenRun(2, 1, 0, 3, False), TokenRun(3, 2, 9, 2, True)]
    parcel, lost = quantised(TokenBatch(runs, hidden))
    assert lost == [runs[1]] and parcel is not None and list(parcel.runs) == [runs[0], runs[2]]
    values, scales = quantise(hidden[[0, 1, 5, 6]])
    assert np.array_equal(parcel.rows, values) and np.array_equal(parcel.scales, scales)
    hidden[:, 0] = bad
    assert quantised(TokenBatch(runs, hidden)) == (None, runs)
    largest = np.full((600, 2), ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    one = TokenRun(1, 0, 0, 600, False)
    assert quantised(TokenBatch([one], largest))[1] == [], "finite, whatever its scales add up to"


class _Nowhere:
    """The way to the next stage: keeps what is sent."""

    device = "next"

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def send(self, frame: Frame) -> None:
        self.frames.append(decode(encode(frame), limits(4)))


class _Passes:
    """A shard that hands on made-up rows."""

    reach, hidden_size, vocabulary, kv_bytes = None, 4, 9, 0

    def forward(self, inputs: Tensor, runs: Sequence[TokenRun]) -> Tensor:
        return inputs

    def release(self, slot: int) -> None: ...
    def close(self) -> None: ...


def test_a_sequence_whose_numbers_are_not_finite_ends_and_the_others_go_on() -> None:
    schedule: Scheduler[StageKey] = Scheduler()
    first = stage(0, stages=2, dtype="bfloat16", downstream="away", downstream_activations="int8", head_device="next")
    told: list[Any] = []
    deployment = LocalDeployment(DEPLOYMENT, schedule, told.append)
    deployment.loaded(LoadedStage(first, [HeldShard.of(first, _Passes())], lambda logits, draws: []))  # type: ignore[arg-type]
    way = _Nowhere()
    deployment.linked(1, {0: way})
    for sequence in (1, 2):
        deployment.arrived(1, 0, [Opened(sequence, sequence - 1, Sampling())])
    hidden = np.ones((2, 4), HALF["bfloat16"])
    hidden[0, 2] = math.inf
    way.frames.clear()
    batch = TokenBatch([TokenRun(n, n - 1, 0, 1, True) for n in (1, 2)], hidden)
    deployment.rings[1].computed(0, *deployment.rings[1].stages[0].compute(batch))
    (released,), (sent,) = (from_frame(frame) for frame in way.frames)
    assert released.sequence == 1 and "no finite numbers" in released.reason  # type: ignore[union-attr]
    assert isinstance(sent, TokenBatch) and sent.scales is not None and sequences(sent) == [2]


def frame_of(*tensors: NamedTensor, tokens: int = 2) -> Frame:
    runs = [TokenRun(1, 0, 0, tokens, True)]
    exact = to_frame(TokenBatch(runs, np.zeros((tokens, 4), HALF["bfloat16"])), DEPLOYMENT, 1, 1)
    return replace(exact, tensors=tensors)


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


HIDDEN = NamedTensor.of("hidden", "I8", (2, 4), bytes(range(8)))
SCALE = NamedTensor.of("scale", "F32", (2,), floats(1, 2))
EXACT = NamedTensor.of("hidden", "BF16", (2, 4), bytes(16))


@pytest.mark.parametrize(
    ("form", "tensors", "rule"),
    [
        ("exact", (HIDDEN, SCALE), Rule.DTYPE),
        ("exact", (EXACT, SCALE), Rule.NAME),
        ("exact", (HIDDEN,), Rule.DTYPE),
        ("int8", (EXACT,), Rule.DTYPE),
        ("int8", (EXACT, SCALE), Rule.DTYPE),
        ("int8", (HIDDEN,), Rule.MISSING),
        ("int8", (SCALE,), Rule.MISSING),
        ("int8", (HIDDEN, SCALE, SCALE), Rule.NAME_TWICE),
        ("int8", (HIDDEN, SCALE, replace(SCALE, name="scales")), Rule.NAME),
        ("int8", (HIDDEN, NamedTensor.of("scale", "F32", (1,), floats(1))), Rule.ROWS),
        ("int8", (HIDDEN, NamedTensor.of("scale", "F32", (3,), floats(1, 2, 3))), Rule.ROWS),
        ("int8", (HIDDEN, NamedTensor.of("scale", "F32", (2, 1), floats(1, 2))), Rule.RANK),
        ("int8", (HIDDEN, NamedTensor.of("scale", "F64", (2,), bytes(16))), Rule.DTYPE),
        ("int8", (HIDDEN, NamedTensor.of("scale", "BF16", (2,), bytes(4))), Rule.DTYPE),
        ("int8", (NamedTensor.of("hidden", "I8", (2, 8), bytes(16)), SCALE), Rule.SHAPE),
        ("int8", (NamedTensor.of("hidden", "I8", (4, 4), bytes(16)), SCALE), Rule.ROWS),
        ("int8", (NamedTensor.of("hidden", "U8", (2, 4), bytes(8)), SCALE), Rule.DTYPE),
    ],
)
def test_only_what_the_plan_says_comes_in(form: str, tensors: tuple[NamedTensor, ...], rule: Rule) -> None:
    allowed = limits(4, upstream_activations=form)
    data = encode(frame_of(*tensors))
    with pytest.raises(FrameRefused) as refused:
        decode(data, replace(allowed, max_bytes=max(allowed.max_bytes, len(data))))
    # a tensor more than the plan has is refused by their number, before it is looked at
    assert refused.value.rule in (rule, Rule.TENSORS)
    good = (HIDDEN, SCALE) if form == "int8" else (EXACT,)
    decode(encode(frame_of(*good)), allowed)


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, math.nan, -math.nan, math.inf, -math.inf])
def test_scales_are_positive_numbers(bad: float) -> None:
    for numbers in ((bad, 1.0), (1.0, bad)):
        frame = frame_of(HIDDEN, NamedTensor.of("scale", "F32", (2,), floats(*numbers)))
        with pytest.raises(FrameError, match="scale"):
            from_frame(decode(encode(frame), limits(4)))


@pytest.mark.parametrize("form", ["exact", "int8"])
def test_what_comes_in_is_read_where_it_lies(form: str) -> None:
    """Neither a frame that is taken nor one that is refused makes a copy of a payload."""
    tokens, width = 512, 2048
    hidden = np.random.default_rng(1).standard_normal((tokens, width)).astype(HALF["bfloat16"])
    run = TokenRun(1, 0, 0, tokens, False)
    parcel: Parcel | None = TokenBatch([run], hidden)
    if form == "int8":
        parcel = quantised(TokenBatch([run], hidden))[0]
    assert parcel is not None
    allowed = limits(width, upstream_activations=form, chunk=tokens)
    data = encode(to_frame(parcel, DEPLOYMENT, 1, 1))
    assert len(data) <= allowed.max_bytes
    refusing = limits(width, upstream_activations="exact" if form == "int8" else "int8", chunk=tokens)
    refusing = replace(refusing, max_bytes=2 * len(data))
    start = np.frombuffer(data, np.uint8).ctypes.data
    tracemalloc.start()
    (came,) = from_frame(decode(data, allowed))
    with pytest.raises(FrameRefused):
        decode(data, refusing)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    read = came.rows  # type: ignore[union-attr]
    assert start <= read.ctypes.data < start + len(data)
    assert peak < 1 << 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that numbers, not headers, make a frame. A token that nobody should say is not a number."""
    directory = make_llama(tmp_path_factory.mktemp("model"), hidden=512)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][SPOILT] = math.nan
    tensors["lm_head.weight"][SPOILT] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


SPOILT = 96
IDS = [one % SPOILT for one in prompt(8, 8)]  # one chunk


def by_hand(deployed: Deployed, ids: list[int], count: int, forms: tuple[str, ...]) -> list[int]:
    """The answer of shards one after another, rounded between where the plan says so."""
    shards = [load_shard(spec) for _, spec in stage_specs(deployed.devices, deployed.inspected, RING, deployed)]
    said: list[int] = []
    while len(said) < count:
        given = ids if not said else said[-1:]
        position = len(ids) + len(said) - 1 if said else 0
        rows = np.array(given)
        for shard, form in zip(shards, (*forms, "exact"), strict=True):
            rows = shard.forward(rows, [in_slot(0, position, len(given), True)])
            rows = dequantise(*quantise(rows), rows.dtype) if form == "int8" else rows
        said.append(int(rows.argmax()))
    for shard in shards:
        shard.close()
    return said


async def sent_bytes(deployed: Deployed, expected: list[int]) -> dict[int, list[int]]:
    """By the stage that an answer's frames of hidden states go to: bytes of each."""
    for device in deployed.devices:
        await device.host.ask(Record(device.host.next_request(), deployed.id, "start"), WAIT_S)
    assert await deployed.generate(IDS, len(expected)) == expected
    await deployed.until_free()
    spans: list[Span] = []
    for device in deployed.devices:
        recorded = await device.host.ask(Record(device.host.next_request(), deployed.id, "take"), WAIT_S)
        assert isinstance(recorded, Recorded) and not recorded.left
        spans += recorded.spans
    carried = [one for one in spans if one.name == "send" and one.kind not in ("token", "open", "release")]
    return {to: [one.nbytes for one in carried if one.stage == to] for to in {one.stage for one in carried}}


@pytest.mark.usefixtures("calm")
async def test_an_answer_over_int8_links(model: Path, tmp_path: Path) -> None:
    """The same tokens as shards with the rounding between them say, in half the bytes; one hop may stay exact."""
    async with devices(2, tmp_path, in_process=True) as made:
        found: dict[tuple[str, ...], dict[int, list[int]]] = {}
        for forms in (("exact", "exact"), ("int8", "exact"), ("int8", "int8")):
            deployed = await deploy(made, model, RING, dtype="bfloat16", activations=forms)
            found[forms] = await sent_bytes(deployed, by_hand(deployed, IDS, 12, forms))
            several = (deployed.generate([one % SPOILT for one in prompt(n, n)], 10) for n in (3, 9, 17, 30))
            assert [len(said) for said in await asyncio.gather(*several)] == [10] * 4
            spoilt, beside = deployed.submit([5, SPOILT, 7], 5), deployed.submit(IDS, 12)
            said, end = await deployed.finished(spoilt)
            assert said == [] and end.finish == "error" and "no finite numbers" in end.error
            assert (await deployed.finished(beside))[1].finish == "length", "another's trouble is its own"
            await deployed.until_free()
            assert not any(device.links_lost() for device in made)
            await deployed.unload()
    exact, some, both = found.values()
    assert {to: len(frames) for to, frames in both.items()} == {to: len(frames) for to, frames in exact.items()}
    assert sum(both[1]) < 0.6 * sum(exact[1]) and sum(both[2]) < 0.6 * sum(exact[2])
    assert some[2] == exact[2] and some[1] == both[1]
    for one, other in zip(exact[1], both[1], strict=True):
        tokens = 1 if one < 2000 else 8
        assert one - other == tokens * 512 - padded(tokens * 4) - 8, "a byte a number less, a scale and its name more"


def padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8
