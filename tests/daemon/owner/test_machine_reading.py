"""What sensors say is taken where it can be true and has to do with computing."""

from __future__ import annotations

from collections import namedtuple

import psutil
import pytest

from peerllm.daemon.decide.owner_limits import OwnerLimits
from peerllm.daemon.owner.machine_reading import battery_percent, hottest_celsius, read_machine

Sensor = namedtuple("Sensor", "label current high critical", defaults=(None, None))
Battery = namedtuple("Battery", "percent secsleft power_plugged")


def test_the_hottest_of_the_sensors_that_count(monkeypatch):
    found = {
        "coretemp": [Sensor("Core 0", 71.0), Sensor("Core 1", 74.0)],
        "nvme": [Sensor("Composite", 99.0)],
        "iwlwifi_1": [Sensor("", 98.0)],
        "acpitz": [Sensor("", 0.0), Sensor("", -273.0), Sensor("", 255.0), Sensor("", None)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: found, raising=False)
    assert hottest_celsius() == 74.0
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    assert hottest_celsius() is None


@pytest.mark.parametrize(
    ("battery", "percent"),
    [(Battery(24, 99, False), 24.0), (Battery(24, 99, True), None), (Battery(24, 99, None), None), (None, None)],
)
def test_a_battery_counts_while_the_machine_lives_on_it(monkeypatch, battery, percent):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert battery_percent() == percent


def test_drivers_that_fail_and_systems_without_sensors_say_nothing(monkeypatch):
    def broken():
        raise OSError("no such device")

    for name, read in (("sensors_battery", battery_percent), ("sensors_temperatures", hottest_celsius)):
        monkeypatch.setattr(psutil, name, broken, raising=False)
        assert read() is None
        monkeypatch.delattr(psutil, name)
        assert read() is None


def test_only_what_a_limit_is_set_for_is_read(monkeypatch):
    def forbidden():
        raise AssertionError

    monkeypatch.setattr(psutil, "sensors_battery", forbidden, raising=False)
    monkeypatch.setattr(psutil, "sensors_temperatures", forbidden, raising=False)
    found = read_machine(OwnerLimits(battery_percent=None))
    assert (found.battery_percent, found.celsius) == (None, None)
    assert 0 <= found.minute < 1440 and found.available_bytes > 0
    assert read_machine(OwnerLimits(battery_percent=None), memory=False).available_bytes is None
