"""Through three real daemons, each with its engine process: token for token what transformers says on one device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.planner.cost.layer_costs import layer_bytes
from peerllm.types import Workload
from tests.e2e import tiny
from tests.household import Device, household

NAMES = ["laptop", "mini-pc", "jetson"]
MEMORY = 12_000_000  # bytes each device lends
SHARE = 2.1  # of MEMORY: what the model is made to need, so that two devices are too few
TOKENS = 32
QUESTION = "Who lives in the lighthouse by the sea, and what does the cat want?"


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    with household(tmp_path_factory.mktemp("exact"), NAMES, memory=str(MEMORY)) as started:
        yield started


def slots_for(directory: Path) -> int:
    """How many slots of the whole context make the model need SHARE × MEMORY."""
    profile = inspect_model(str(directory), "auto").profile
    weights = sum(
        layer_bytes(profile, index, Workload(sequences=1, context=1), bool(layer.tied_to is not None))
        for index, layer in enumerate(profile.layers)
    )
    a_slot = tiny.CONTEXT * sum(layer.kv_bytes_per_token for layer in profile.layers)
    return int((SHARE * MEMORY - weights) / a_slot)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_three_daemons_say_what_one_device_says(devices: list[Device], family: str, tmp_path: Path) -> None:
    directory = tiny.make(family, tmp_path / family)
    expected = tiny.answer(directory, QUESTION, TOKENS)
    assert len(set(expected)) > 4, "a model that repeats itself proves nothing"
    source = devices[sorted(tiny.FAMILIES).index(family) % len(devices)]  # every device is the source once
    source.cli("run", str(directory), "--slots", str(slots_for(directory)), "--context", str(tiny.CONTEXT))
    try:
        deployment = source.status()["deployments"][0]
        assert {stage["device"] for stage in deployment["plan"]["stages"]} == set(NAMES), deployment
        body = {
            "model": deployment["model"],
            "temperature": 0,
            "max_tokens": TOKENS,
            "return_token_ids": True,
            "messages": [{"role": "user", "content": QUESTION}],
        }
        choice = source.post("/v1/chat/completions", body)["choices"][0]
    finally:
        source.cli("stop", deployment["model"])
    assert choice["token_ids"] == expected
    assert choice["finish_reason"] == "length"
