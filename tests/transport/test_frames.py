"""The frame format: what is encoded comes back; what the plan does not allow is named and refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from peerllm.errors import FrameError, LinkError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.encoder import encode_buffers
from peerllm.transport.frames.frame import Frame, FrameKind, NamedTensor
from peerllm.transport.frames.limits import FrameLimits, FrameRefused, Rule, TensorLimit
from peerllm.transport.frames.token_run import TokenRun
from tests.sizes import examples
from tests.transport.frames_support import DEPLOYMENT, HIDDEN, LIMITS, encode, frames

DATA = bytes(range(2 * HIDDEN * 4 % 256)) + bytes(2 * HIDDEN * 4 - 2 * HIDDEN * 4 % 256)
ACTIVATION = Frame(
    FrameKind.ACTIVATION,
    DEPLOYMENT,
    7,
    2,
    (TokenRun(2**63 + 1, 5, 62, 2, True),),
    (NamedTensor.of("hidden", "F32", (2, HIDDEN), DATA),),
)


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow])
@given(frames())
def test_what_is_encoded_comes_back(frame: Frame) -> None:
    data = encode(frame)
    assert decode(data, LIMITS) == frame
    assert b"".join(encode_buffers(frame)) == data
    assert len(data) % 8 == 0
    assert len(data) <= LIMITS.largest()


def test_bytes_are_those_of_the_specification() -> None:
    frame = Frame(
        FrameKind.OPEN,
        DEPLOYMENT,
        7,
        2,
        (TokenRun(1, 2, 3, 4, True),),
        (NamedTensor.of("scale", "F64", (), bytes(8)),),
    )
    assert encode(frame).hex() == (
        "504c4652" "02" "04" "0200" "07000000" + DEPLOYMENT + "0100" "0100" "50000000" "00000000"
        "0100000000000000" "02000000" "03000000" "04000000" "01000000"
        "05" "08" "00" "00" + b"scale".hex() + "00" * 7
        + "00" * 8
    )  # fmt: skip


def test_payloads_are_views_and_aligned() -> None:
    data = encode(ACTIVATION)
    (tensor,) = decode(data, LIMITS).tensors
    assert tensor.data.obj is data
    array = np.frombuffer(tensor.data, dtype="<f4").reshape(tensor.shape)
    assert array.flags.aligned
    assert array.tobytes() == DATA


def test_buffers_hold_the_payload_itself() -> None:
    payload = bytearray(DATA)
    frame = replace(ACTIVATION, tensors=(NamedTensor.of("hidden", "F32", (2, HIDDEN), payload),))
    assert any(getattr(buffer, "obj", None) is payload for buffer in encode_buffers(frame))


def test_the_largest_frame_is_exactly_the_limit() -> None:
    runs = tuple(TokenRun(slot, slot, 0, 4) for slot in range(4))
    tensors = (
        NamedTensor.of("hidden", "F32", (16, HIDDEN), bytes(16 * HIDDEN * 4)),
        NamedTensor.of("mask", "BOOL", (4, 5), bytes(20)),
        NamedTensor.of("extra", "I64", (24,), bytes(24 * 8)),
        NamedTensor.of("scale", "F64", (), bytes(8)),
    )
    frame = Frame(FrameKind.ACTIVATION, DEPLOYMENT, 7, 2, runs, tensors)
    assert len(encode(frame)) == LIMITS.largest() == LIMITS.max_bytes
    assert decode(encode(frame), LIMITS) == frame
    with pytest.raises(FrameRefused) as refusal:
        decode(encode(frame), replace(LIMITS, max_bytes=LIMITS.max_bytes - 1))
    assert refusal.value.rule is Rule.TOO_LARGE


def test_a_frame_has_as_many_runs_as_the_plan_allows_and_not_one_more() -> None:
    frame = replace(ACTIVATION, kind=FrameKind.OPEN, tensors=())
    most = replace(frame, runs=tuple(TokenRun(slot, slot, 0, 0) for slot in range(LIMITS.max_runs)))
    assert decode(encode(most), LIMITS) == most
    more = replace(frame, runs=(*most.runs, TokenRun(9, LIMITS.max_runs, 0, 0)))
    with pytest.raises(FrameRefused) as refusal:
        decode(encode(more), LIMITS)
    assert refusal.value.rule is Rule.RUNS


@pytest.mark.parametrize(
    ("change", "rule", "line"),
    [
        ({"epoch": 6}, Rule.EPOCH, "frame of another epoch: 7, the plan's is 6"),
        ({"epoch": 8}, Rule.EPOCH, "frame of another epoch: 7, the plan's is 8"),
        ({"stage": 1}, Rule.STAGE, "frame for another stage: 2, this is 1"),
        ({"stage": 3}, Rule.STAGE, "frame for another stage: 2, this is 3"),
        ({"deployment": "f" * 32}, Rule.DEPLOYMENT, f"frame of another deployment: {DEPLOYMENT}"),
        ({"slots": 5}, Rule.SLOT, "frame names a slot the plan does not have: 5 of 5"),
        ({"context": 63}, Rule.CONTEXT, "frame reaches beyond the context: 62 + 2 tokens of 63"),
        ({"max_tokens": 1}, Rule.TOKENS, "frame of more tokens than the plan's: 2, at most 1"),
        ({"kinds": (FrameKind.TOKEN,)}, Rule.KIND, "frame of a kind not allowed here: 1"),
        ({"tensors": {}}, Rule.TENSORS, "frame of more tensors than the plan's: 1, at most 0"),
        (
            {"tensors": {"other": TensorLimit(("F32",), 0)}},
            Rule.NAME,
            "frame holds a tensor the plan does not have: 'hidden'",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong(change: dict[str, object], rule: Rule, line: str) -> None:
    limits = replace(LIMITS, max_bytes=10_000, **change)  # type: ignore[arg-type]
    with pytest.raises(FrameRefused) as refusal:
        decode(encode(ACTIVATION), limits)
    assert refusal.value.rule is rule
    assert str(refusal.value) == line
    assert isinstance(refusal.value, FrameError | LinkError)


def test_limits_that_bound_nothing_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="needs max_elements"):
        TensorLimit(("F32",), 3, last_dim=4, per_token=True)
    with pytest.raises(ValueError, match="no room"):
        TensorLimit(("F32",), 0, last_dim=4)
    with pytest.raises(ValueError, match="known dtypes"):
        TensorLimit(("F31",), 1, max_elements=1)
    with pytest.raises(ValueError, match="32 lower-case hex"):
        replace(LIMITS, deployment="F" * 32)
    with pytest.raises(ValueError, match="tensor name"):
        replace(LIMITS, tensors={"Hidden": TensorLimit(("F32",), 0)})
    with pytest.raises(ValueError, match="at least 1"):
        FrameLimits(DEPLOYMENT, 1, 0, (FrameKind.TOKEN,), 0, 1, 1, 1)


def test_a_tensor_must_be_as_long_as_its_shape() -> None:
    with pytest.raises(ValueError, match="4 bytes are not F32"):
        NamedTensor.of("hidden", "F32", (2,), bytes(4))


@pytest.mark.parametrize("field", ["sequence", "slot", "position", "length"])
@pytest.mark.parametrize("value", [2**64, -1])
def test_a_run_must_fit_its_fields(field: str, value: int) -> None:
    (run,) = ACTIVATION.runs
    with pytest.raises(ValueError, match="does not fit"):
        encode(replace(ACTIVATION, runs=(replace(run, **{field: value}),)))


@pytest.mark.parametrize("change", [{"epoch": 2**32}, {"epoch": -1}, {"stage": 2**16}, {"stage": -1}])
def test_an_address_must_fit_its_fields(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        encode(replace(ACTIVATION, **change))  # type: ignore[arg-type]
