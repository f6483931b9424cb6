"""While a demo runs, commands without options reach it, unless a device of this user runs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from peerllm.cli.device import LocalDevice, demo_note, demo_of, write_daemon_file
from peerllm.errors import NotFoundError

DEMO_URL, OWN_URL = "http://127.0.0.1:1111", "http://127.0.0.1:2222"


def running(directory: Path, url: str) -> Path:
    """The files of a device that runs."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "token").write_text("x" * 43)
    write_daemon_file(directory, url)
    return directory


def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_demo_is_reached_while_it_runs_and_not_after(tmp_path: Path) -> None:
    home, demo = tmp_path / "share" / "peerllm", running(tmp_path / "demo", DEMO_URL)
    with demo_note(home, demo) as noted:
        assert noted and LocalDevice(home).url == DEMO_URL
        assert stat.S_IMODE((home / "demo.json").stat().st_mode) == 0o600
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        with pytest.raises(NotFoundError, match="no device is running"):
            LocalDevice(tmp_path)
    assert list(home.iterdir()) == []
    with pytest.raises(NotFoundError, match=f"no device is running on {home}"):
        LocalDevice(home)


def test_a_device_of_ones_own_comes_first(tmp_path: Path) -> None:
    home, demo = running(tmp_path / "own", OWN_URL), running(tmp_path / "demo", DEMO_URL)
    before = (home / "daemon.json").read_bytes()
    with demo_note(home, demo) as noted:
        assert not noted and LocalDevice(home).url == OWN_URL
    assert (home / "daemon.json").read_bytes() == before
    with demo_note(tmp_path / "none", demo):
        running(tmp_path / "none", OWN_URL)
        assert LocalDevice(tmp_path / "none").url == OWN_URL


def test_what_a_killed_device_or_demo_left_does_not_count(tmp_path: Path) -> None:
    home, demo = running(tmp_path / "own", OWN_URL), running(tmp_path / "demo", DEMO_URL)
    (home / "daemon.json").write_text(json.dumps({"url": OWN_URL, "pid": ended()}))
    with demo_note(home, demo) as noted:
        assert noted and LocalDevice(home).url == DEMO_URL
    (home / "demo.json").write_text(json.dumps({"data": str(demo), "pid": ended()}))
    assert demo_of(home) is None
    (home / "demo.json").write_text(json.dumps({"data": str(demo), "pid": os.getpid()}))
    assert demo_of(home) == demo


def test_of_two_demos_the_later_has_the_word(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first, second = running(tmp_path / "first", OWN_URL), running(tmp_path / "second", DEMO_URL)
    with demo_note(home, second):
        with demo_note(home, first):
            assert LocalDevice(home).url == OWN_URL
        assert demo_of(home) is None
    with demo_note(home, first) as one:
        other = demo_note(home, second)
        other.__enter__()
        assert one and LocalDevice(home).url == DEMO_URL
    assert LocalDevice(home).url == DEMO_URL, "the first demo took the second's note away"
    other.__exit__(None, None, None)
    assert demo_of(home) is None


@pytest.mark.parametrize(
    "note",
    ["", "{", "[]", "{}", '{"pid": true}', '{"pid": "1", "data": "/"}', '{"pid": PID}', '{"pid": PID, "data": 3}'],
)
def test_a_damaged_note_is_none(tmp_path: Path, note: str) -> None:
    (tmp_path / "demo.json").write_text(note.replace("PID", str(os.getpid())))
    assert demo_of(tmp_path) is None


def test_where_nothing_can_be_written_the_demo_runs_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with demo_note(tmp_path / "file" / "home", tmp_path / "demo") as noted:
        assert not noted
