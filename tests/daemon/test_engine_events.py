"""When a device without layers keeps its engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peerllm.daemon.control_messages import DeploymentView
from peerllm.daemon.engine_events import may_need_engines
from peerllm.types import Stage

ALONE = DeploymentView("d" * 32, "m", "serving", 1, "a", (Stage("a", 0, 3),), (1,))
SEVERAL = replace(ALONE, stages=(Stage("a", 0, 1), Stage("b", 2, 3)), stage_memory_bytes=(1, 1))


@pytest.mark.parametrize(("view", "needed"), [
    (replace(ALONE, state="planning", stages=()), True),
    (replace(ALONE, state="loading"), True),
    (ALONE, False),
    (SEVERAL, True),
    (replace(SEVERAL, state="stopped"), False),
    (replace(ALONE, state="waiting", stages=()), False),
])  # fmt: skip
def test_engines_stay_where_one_device_may_have_to_replace_another(view: DeploymentView, needed: bool) -> None:
    assert may_need_engines(view) is needed
