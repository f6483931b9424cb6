"""Small files of the data directory: written as a whole or not at all, also where the disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from peerllm.errors import DiskFullError, PeerLLMError, UnavailableError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` in place of the file at once; OSError leaves the file as it was and nothing beside it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(aside).unlink()
        raise


def disk_error(error: OSError, place: Path, what: str) -> PeerLLMError:
    """Why `what` cannot be written to `place`, in one sentence that says what to do."""
    if error.errno in FULL:
        return DiskFullError(f"the disk that holds {place} is full, so {what} cannot be written; free some space there")
    return UnavailableError(f"{what} cannot be written to {place}: {error.strerror or error}")
