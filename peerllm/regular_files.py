"""Opening files that others may have prepared: regular ones alone, and without ever waiting for the other end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class UnfitFileError(OSError):
    """A pipe, device, socket or directory stands where a file belongs, or the file is too large."""

    def __str__(self) -> str:
        return f"it {self.strerror}"


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read it; OSError says what stands in its place, which is not opened."""
    _check(path, Path(path).stat().st_mode)  # opening a device may already do something
    descriptor = os.open(path, _FLAGS)  # does not wait for a writer if a pipe has just taken the file's place
    try:
        _check(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most: int) -> bytes:
    """The whole file; OSError if it is no regular file or has more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= most:
            return file.read(size)
    raise UnfitFileError(errno.EFBIG, f"is larger than {most} bytes", str(path))


def _check(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise UnfitFileError(errno.EINVAL, f"is {kind}, no regular file", str(path))
