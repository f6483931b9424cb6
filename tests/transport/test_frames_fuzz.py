"""The decoder under fire: no input crashes it, none makes it take memory beyond the plan's, every refusal is reached.

PEERLLM_FUZZ_INPUTS sets how many inputs (5000 unless told, `make lab` runs 60000); half are valid frames with one to
three fields changed. PEERLLM_FUZZ_SEED=random draws other inputs each time.
"""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.frame import Frame
from peerllm.transport.frames.limits import FrameRefused, Rule
from tests.transport.frames_support import LIMITS, changed_frames, encode, frames

INPUTS = int(os.environ.get("PEERLLM_FUZZ_INPUTS", "5000"))
DERANDOMIZE = os.environ.get("PEERLLM_FUZZ_SEED") != "random"
OBJECTS_BYTES = 8 << 10  # Python's own objects for the segments and tensors that the plan allows, and one error
MOST_BYTES = LIMITS.max_bytes + OBJECTS_BYTES

prefixes = st.builds(
    lambda frame, noise, at: encode(frame)[:at] + noise, frames(), st.binary(max_size=64), st.integers(0, 120)
)
others = st.binary(max_size=LIMITS.max_bytes + 64) | prefixes | frames().map(encode)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_input_crashes_or_takes_memory_beyond_the_plan() -> None:
    outcomes: Counter[Rule | None] = Counter()
    inputs = Counter[bool]()

    def traced(data: bytes) -> tuple[Frame | None, Rule | None, str, int]:
        """(frame, rule, refusal's line, most bytes that were taken at once)"""
        tracemalloc.start()
        try:
            frame: Frame | None = decode(data, LIMITS)
            rule, line = None, ""
        except FrameRefused as refusal:
            frame, rule, line = None, refusal.rule, str(refusal)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return frame, rule, line, peak_bytes

    def check(data: bytes) -> None:
        frame, rule, line, peak_bytes = traced(data)
        if peak_bytes > MOST_BYTES:  # the collector or another thread may have taken some; the decoder would again
            peak_bytes = min(traced(data)[-1] for _ in range(3))
        outcomes[rule] += 1
        assert "\n" not in line
        assert len(line) < 300
        assert peak_bytes <= MOST_BYTES, f"{peak_bytes} bytes for {data.hex()}"
        if frame is not None:
            assert encode(frame) == data, "two spellings of one frame"

    # Shrinking would call `check` again on inputs nobody counted; the first failure is told as it is.
    fuzz = settings(
        max_examples=INPUTS // 2,
        database=None,
        derandomize=DERANDOMIZE,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @fuzz
    @given(changed_frames())
    def changed(data: bytes) -> None:
        inputs[True] += 1
        check(data)

    @fuzz
    @given(others)
    def anything(data: bytes) -> None:
        inputs[False] += 1
        check(data)

    changed()
    anything()
    assert inputs[True] >= INPUTS // 2
    assert inputs[False] >= INPUTS // 2
    assert set(Rule) - set(outcomes) == set(), f"refusals never reached, of {dict(outcomes)}"
    assert outcomes[None] > INPUTS // 20, "hardly anything was valid: the inputs do not reach deep"
