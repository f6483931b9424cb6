"""How `peerllm status` tells the speed of each device of a plan."""

from __future__ import annotations

import pytest

from peerllm.cli.look import deployment_text

BLOCKS = {"pass": {"1": 9.0}, "block:full": {"1": 1.0, "128": 50.0}, "block:window": {"1": 2.0}, "head": {"1": 7.0}}


@pytest.mark.parametrize(
    ("profiles", "text"),
    [
        ({"a": {"alone": BLOCKS, "contention": 1.0, "source": "measured"}}, "1.5 ms"),
        ({"a": {"alone": BLOCKS, "contention": 1.75, "source": "cached"}}, "1.5 ms, 2.6 ms beside the others"),
        ({"a": {"alone": BLOCKS, "contention": 1.0, "source": "estimated"}}, "about 1.5 ms"),
        ({"a": {"alone": {"head": {"1": 1.0}}, "contention": 1.0, "source": "measured"}}, "1.00 kB"),
        ({}, "1.00 kB"),
    ],
)
def test_the_time_of_a_block_stands_beside_each_stage(profiles: dict[str, object], text: str) -> None:
    stage = {"device": "a", "first_layer": 0, "last_layer": 3, "memory_bytes": 1000}
    one = {"name": "m", "model": "m", "state": "serving", "coordinator": "a", "epoch": 1, "plan": {"stages": [stage]}}
    shown = deployment_text({**one, "profiles": profiles})
    assert shown.rstrip().endswith(text)
