"""Small files: as a whole or not at all, and written later where the disk was full."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from peerllm import saved_files
from peerllm.errors import DiskFullError, UnavailableError
from peerllm.saved_files import SavedFile, disk_error, replace_file


class FullDisk:
    """While `full` is set, no file gets its bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.tried = True, asyncio.Event()
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self.tried.set()
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


def test_a_full_disk_leaves_the_file_as_it_was_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file(tmp_path / "a" / "x.json", b"old")
    assert (tmp_path / "a" / "x.json").stat().st_mode & 0o777 == 0o600
    FullDisk(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "a" / "x.json", b"new")
    assert (tmp_path / "a" / "x.json").read_bytes() == b"old" and names(tmp_path / "a") == {"x.json"}


def test_why_is_one_sentence(tmp_path: Path) -> None:
    error = disk_error(OSError(errno.ENOSPC, "x"), tmp_path, "the roster")
    assert isinstance(error, DiskFullError) and f"{tmp_path} is full, so the roster cannot be written" in str(error)
    error = disk_error(OSError(errno.EACCES, "Permission denied"), tmp_path, "the roster")
    assert isinstance(error, UnavailableError) and str(error).endswith("Permission denied")


async def test_what_a_full_disk_did_not_take_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saved_files, "RETRY_S", 0.001)
    file, disk = SavedFile(tmp_path / "x.json", "the roster"), FullDisk(monkeypatch)
    await file.save(b"first")
    await file.save(b"second")
    assert caplog.text.count("is full, so the roster cannot be written") == 2 and not names(tmp_path)
    disk.tried.clear()
    async with asyncio.timeout(10):
        await disk.tried.wait()  # it goes on trying
        disk.full = False
        assert file._retry is not None
        await file._retry
    assert (tmp_path / "x.json").read_bytes() == b"second"
    await file.close()
    await file.close()


async def test_what_is_in_the_file_already_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SavedFile(tmp_path / "x.json", "the roster")
    file.written = b"same"
    disk = FullDisk(monkeypatch)
    await file.save(b"same")
    assert not disk.tried.is_set()
    await file.save(b"other")
    assert disk.tried.is_set()
    await file.close()
