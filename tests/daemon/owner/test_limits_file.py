"""Limits survive restarts, what was said last counts, and nothing that is no limit is taken."""

from __future__ import annotations

import json
import stat
from dataclasses import replace

import pytest

from peerllm.daemon.decide.owner_limits import OwnerLimits
from peerllm.daemon.owner.limits_file import LIMITS_FILE, changed, keep, recalled
from peerllm.errors import BadInputError

NOTHING = {"memory_bytes": None, "threads": None, "hours": None, "battery_percent": None, "hot_celsius": None}


def test_without_options_and_file_there_are_the_defaults(tmp_path):
    assert recalled(tmp_path, NOTHING) == OwnerLimits()
    assert stat.S_IMODE((tmp_path / LIMITS_FILE).stat().st_mode) == 0o600


def test_options_count_and_what_is_said_while_it_runs_counts_until_other_options_are_given(tmp_path):
    given = {**NOTHING, "memory_bytes": 4, "hours": (1200, 480)}
    limits = recalled(tmp_path, given)
    assert limits == OwnerLimits(memory_bytes=4, hours=(1200, 480))
    keep(tmp_path, changed(limits, {"memory_bytes": 2, "hours": [0, 1440], "paused": True}), given)
    expected = OwnerLimits(memory_bytes=2, paused=True)
    assert recalled(tmp_path, given) == expected  # the same start: a service after a reboot
    assert recalled(tmp_path, given) == expected
    assert recalled(tmp_path, {**given, "hours": (60, 120)}) == replace(expected, hours=(60, 120))
    assert recalled(tmp_path, {**NOTHING, "hours": (60, 120)}).memory_bytes is None  # left out: as if never given
    assert recalled(tmp_path, NOTHING) == OwnerLimits(paused=True)


def test_zero_takes_a_limit_back(tmp_path):
    full = OwnerLimits(1, 2, (60, 120), 30, 90.0)
    zeros = {"memory_bytes": 0, "threads": 0, "hours": None, "battery_percent": 0, "hot_celsius": 0}
    assert changed(full, zeros) == OwnerLimits(battery_percent=None)
    assert changed(full, {"hours": (0, 1440)}).hours is None
    assert recalled(tmp_path, {**NOTHING, "battery_percent": 0}).battery_percent is None
    assert recalled(tmp_path, {**NOTHING, "battery_percent": 0}).battery_percent is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("paused", 1), ("paused", None), ("paused", "yes"), ("threads", -1), ("threads", 2.0), ("threads", True),
        ("threads", "2"), ("threads", 10**9), ("memory_bytes", 2**51), ("memory_bytes", 1.5), ("hours", 20),
        ("hours", [20]), ("hours", [1, 1]), ("hours", [-1, 5]), ("hours", [0, 1441]), ("hours", [0, 1.0]),
        ("hours", [True, 5]), ("hours", {}), ("battery_percent", 101), ("battery_percent", 30.5),
        ("hot_celsius", 151), ("hot_celsius", float("nan")), ("hot_celsius", []), ("anything", 1),
    ],
)  # fmt: skip
def test_what_is_no_limit_is_refused_by_name(name, value):
    with pytest.raises(BadInputError, match=name):
        changed(OwnerLimits(), {name: value})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"limits": 7}', '{"limits": {"threads": -1}}', '{"limits": {"x": 1}}']
)
def test_a_damaged_file_stops_no_start(tmp_path, text):
    (tmp_path / LIMITS_FILE).write_text(text)
    assert recalled(tmp_path, NOTHING) == OwnerLimits()
    assert json.loads((tmp_path / LIMITS_FILE).read_text())["limits"]["threads"] is None
