"""Small files that outlive a restart: written as a whole or not at all, and again later where the disk is full."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import tempfile
from pathlib import Path

from peerllm.errors import DiskFullError, PeerLLMError, UnavailableError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
RETRY_S = 10.0  # until what could not be written is tried again

log = logging.getLogger(__name__)


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` in place of the file at once; OSError leaves the file as it was and nothing beside it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if hasattr(os, "fchmod"):
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


class SavedFile:
    """One file; content that could not be written is tried again every RETRY_S, until it or a newer one is."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        self.written: bytes | None = None  # what is known to be in the file
        self._wanted: bytes | None = None
        self._turn = asyncio.Lock()
        self._retry: asyncio.Task[None] | None = None

    async def save(self, data: bytes) -> None:
        """Returns when it is written, or when that failed and was told in the log."""
        self._wanted = data
        if not await self._write() and self._retry is None:
            self._retry = asyncio.create_task(self._keep_trying(), name=f"save {self._path.name}")

    async def close(self) -> None:
        """Try no more. May be called twice."""
        if self._retry is not None:
            self._retry.cancel()
            await asyncio.gather(self._retry, return_exceptions=True)
            self._retry = None

    async def _keep_trying(self) -> None:
        while not await self._later():
            pass
        log.info("%s is written again", self._path)
        self._retry = None

    async def _later(self) -> bool:
        await asyncio.sleep(RETRY_S)
        return await self._write(quiet=True)

    async def _write(self, quiet: bool = False) -> bool:
        async with self._turn:
            data = self._wanted
            if data is None or data == self.written:
                return True
            try:
                await asyncio.to_thread(replace_file, self._path, data)
            except OSError as error:
                if not quiet:
                    why = disk_error(error, self._path.parent, self._what)
                    log.error("%s; it is tried again every %g s", why, RETRY_S)
                return False
            self.written = data
            return True
