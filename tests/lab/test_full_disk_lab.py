"""Devices whose disk is really full: a small file system in memory is filled to its last byte."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.household import Device

pytestmark = [pytest.mark.lab, pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")]
WAIT_S = 60
OPTIONS = ("--no-mdns", "--loopback")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """One megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def test_a_device_without_an_identity_says_in_one_sentence_why_it_cannot_start(disk: Path) -> None:
    (disk / "data").mkdir()
    fill(disk)
    argv = [sys.executable, "-m", "peerllm", "up", "--data", str(disk / "data"), *OPTIONS, "--port", "0"]
    done = subprocess.run([*argv, "--api", "127.0.0.1:0"], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("peerllm: ")]
    assert len(said) == 1 and "is full" in said[0] and "free some space" in said[0], done.stderr
    assert "Traceback" not in done.stderr
    assert all(one.stat().st_size == 0 or one.name == "daemon.json" for one in (disk / "data").iterdir())


def test_a_device_of_a_household_starts_on_a_full_disk_and_heals_when_there_is_room(disk: Path) -> None:
    device = Device(disk / "data", "one", memory="100MB", options=OPTIONS).start().wait_ready()
    roster = (disk / "data" / "household.json").read_bytes()
    device.stop()
    fill(disk)
    device = Device(disk / "data", "one", memory="100MB", options=OPTIONS)
    device.data_dir = disk.parent / "log"  # where its log goes
    device.start()
    try:
        device.wait_ready()
        assert not (disk / "data" / "daemon.json").exists()
        assert (disk / "data" / "household.json").read_bytes() == roster
        (disk / "filler").unlink()
        until = time.monotonic() + WAIT_S
        while not (disk / "data" / "daemon.json").exists() and time.monotonic() < until:
            time.sleep(0.2)
        device.data_dir = disk / "data"
        assert device.cli("status").returncode == 0, "other commands find it again"
    finally:
        device.stop()
