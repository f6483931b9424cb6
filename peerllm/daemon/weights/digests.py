"""SHA-256 of checkpoint tensors, computed once per file version and kept on disk."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import orjson

from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError

BLOCK_BYTES = 4 << 20
PROGRESS_S = 0.1  # between two tellings
MAX_FILES = 4096  # checkpoint files remembered; the longest known are forgotten first

Key = tuple[str, int, int]  # path, offset, nbytes
Known = dict[str, dict[str, object]]  # path: {"version": ..., "tensors": {"offset:nbytes": sha256}}


class Digests:
    """Hashes tensors in a thread; the answers are kept in `path` for as long as the files do not change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    async def of(self, tensors: Iterable[TensorAt], progress: Callable[[int, int], None]) -> dict[Key, str]:
        """The hash of each tensor; `progress` is called on the loop. ModelError if a file cannot be read."""
        loop, halt = asyncio.get_running_loop(), threading.Event()
        wanted = {(tensor.path, tensor.offset, tensor.nbytes): tensor for tensor in tensors}

        def told(done: int, total: int) -> None:
            loop.call_soon_threadsafe(progress, done, total)

        try:
            return await asyncio.to_thread(self._work, list(wanted), told, halt)
        finally:
            halt.set()

    def _work(self, wanted: list[Key], progress: Callable[[int, int], None], halt: threading.Event) -> dict[Key, str]:
        with self._lock:
            known, found = self._read(), {}
            total, done, fresh, told = sum(nbytes for _, _, nbytes in wanted), 0, False, 0.0
            for path, offset, nbytes in wanted:
                version = _version(path)
                entry = known.get(path)
                if entry is None or entry.get("version") != version:
                    known.pop(path, None)
                    entry = known[path] = {"version": version, "tensors": {}}
                tensors = entry["tensors"]
                assert isinstance(tensors, dict)
                place = f"{offset}:{nbytes}"
                if place not in tensors:
                    tensors[place] = hash_range(path, offset, nbytes, halt)
                    fresh = True
                found[path, offset, nbytes] = str(tensors[place])
                done += nbytes
                if done == total or time.monotonic() - told >= PROGRESS_S:
                    told = time.monotonic()
                    progress(done, total)
            if fresh:
                self._write(known)
            return found

    def _read(self) -> Known:
        try:
            known = orjson.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}  # a cache: what is not there is computed again
        return known if isinstance(known, dict) else {}

    def _write(self, known: Known) -> None:
        for path in list(known)[: max(0, len(known) - MAX_FILES)]:
            del known[path]
        scratch = self._path.with_suffix(".new")
        scratch.write_bytes(orjson.dumps(known))
        scratch.replace(self._path)


def _version(path: str) -> str:
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return f"{stat.st_mtime_ns}:{stat.st_size}:{stat.st_ino}"


def hash_range(path: str | Path, offset: int, nbytes: int, halt: threading.Event | None = None) -> str:
    """SHA-256 of `nbytes` at `offset`; ModelError if the file is shorter or `halt` is set."""
    digest, left = hashlib.sha256(), nbytes
    try:
        with Path(path).open("rb") as file:
            file.seek(offset)
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                if not block or (halt is not None and halt.is_set()):
                    raise ModelError(f"{path} ends before the tensor at {offset}")
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
