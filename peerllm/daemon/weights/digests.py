"""SHA-256 of tensors in model files: computed once for each version of a file, and once more after each start.

`path` remembers them from one start to the next, so that a plan need not wait for them; what was remembered is compared
with the bytes before a model of this device serves. Within one process a file that did not change is not read again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson

from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError
from peerllm.regular_files import open_regular
from peerllm.saved_files import replace_file

BLOCK_BYTES = 4 << 20
PROGRESS_S = 0.1  # between two tellings
MAX_FILES = 4096  # checkpoint files remembered; the longest known are forgotten first
WORTH_TELLING_BYTES = 100 << 20
MOST_NAMED = 3  # tensors in a message
HASH_THREADS = min(4, os.cpu_count() or 1)

Key = tuple[str, int, int]  # path, offset, nbytes
Known = dict[str, dict[str, object]]  # path: {"version": ..., "tensors": {"offset:nbytes": sha256}}
Stat = tuple[int, int, int, int]  # inode, size, mtime_ns, ctime_ns
Told = Callable[[int, int], None]  # bytes done, bytes in all

log = logging.getLogger(__name__)


class Digests:
    """Hashes tensors in threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._memory: Known | None = None
        self._places: dict[str, Key] = {}  # by SHA-256
        self._checked: dict[Key, tuple[Stat, str]] = {}  # read in this process

    async def of(self, tensors: Iterable[TensorAt], progress: Told) -> dict[Key, str]:
        """The hash of each tensor, as remembered or computed; `progress` is called on the loop.

        ModelError if a file cannot be read.
        """
        return await self._aside(tensors, progress, again=False)

    async def verify(self, tensors: Iterable[TensorAt], progress: Told) -> dict[Key, str]:
        """The same, but what was not read since this device started is read, and must be what is remembered.

        ModelError names the tensors whose bytes changed while the file's size and time did not.
        """
        return await self._aside(tensors, progress, again=True)

    def find(self, sha256: str) -> TensorAt | None:
        """Where a tensor of that hash lies, if its file is still the one that was hashed."""
        with self._lock:
            self._read()
            place = self._places.get(sha256)
            if place is None:
                return None
            path, offset, nbytes = place
            try:
                if self._read().get(path, {}).get("version") != _version(Path(path).stat()):
                    return None
            except OSError:
                return None
        return TensorAt("", "U8", (nbytes,), path, offset, nbytes)

    async def _aside(self, tensors: Iterable[TensorAt], progress: Told, again: bool) -> dict[Key, str]:
        loop, halt = asyncio.get_running_loop(), threading.Event()
        wanted = {(tensor.path, tensor.offset, tensor.nbytes): tensor.name for tensor in tensors}

        def told(done: int, total: int) -> None:
            loop.call_soon_threadsafe(progress, done, total)

        try:
            return await asyncio.to_thread(self._work, wanted, told, halt, again)
        finally:
            halt.set()

    def _work(self, wanted: dict[Key, str], progress: Told, halt: threading.Event, again: bool) -> dict[Key, str]:
        stats = {path: _stat(path) for path in dict.fromkeys(path for path, _, _ in wanted)}
        found, missing = dict[Key, str](), list[Key]()
        for key in wanted:
            checked, remembered = self._checked.get(key), self._remembered(key, stats[key[0]])
            if checked is not None and checked[0] == _identity(stats[key[0]]):
                found[key] = checked[1]
            elif remembered and not again:
                found[key] = remembered
            else:
                missing.append(key)
        fresh = hash_all(missing, progress, halt)
        changed = [key for key, sha256 in fresh.items() if self._remembered(key, stats[key[0]]) not in ("", sha256)]
        if changed:
            names = ", ".join(wanted[key] for key in changed[:MOST_NAMED])
            more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
            raise ModelError(
                f"{changed[0][0]} changed silently: {names}{more} no longer hold what they did, though the file's size "
                "and time are the same; put a good copy there, or `touch` it to use it as it is"
            )
        for key, sha256 in fresh.items():
            self._checked[key] = (_identity(stats[key[0]]), sha256)
        if fresh:
            self._remember(fresh, stats)
        return found | fresh

    def _remembered(self, key: Key, stat: os.stat_result) -> str:
        with self._lock:
            entry = self._read().get(key[0], {})
            tensors = entry.get("tensors")
            if entry.get("version") != _version(stat) or not isinstance(tensors, dict):
                return ""
            return str(tensors.get(f"{key[1]}:{key[2]}", ""))

    def _remember(self, found: dict[Key, str], stats: dict[str, os.stat_result]) -> None:
        with self._lock:
            known = self._read()
            for path, stat in stats.items():
                if known.get(path, {}).get("version") != _version(stat):
                    known.pop(path, None)
                    known[path] = {"version": _version(stat), "tensors": {}}
            for (path, offset, nbytes), sha256 in found.items():
                tensors = known[path]["tensors"]
                assert isinstance(tensors, dict)
                tensors[f"{offset}:{nbytes}"] = sha256
                self._places[sha256] = path, offset, nbytes
            for path in list(known)[: max(0, len(known) - MAX_FILES)]:
                del known[path]
            try:
                replace_file(self._path, orjson.dumps(known))
            except OSError as error:  # they are computed again after the next start
                log.warning("the hashes of weights cannot be kept for the next start: %s", error.strerror)

    def _read(self) -> Known:
        if self._memory is None:
            self._memory = {}
            try:
                for path, entry in orjson.loads(self._path.read_bytes()).items():
                    tensors = {str(place): str(sha256) for place, sha256 in entry["tensors"].items()}
                    for place, sha256 in tensors.items():
                        offset, _, nbytes = place.partition(":")
                        self._places[sha256] = path, int(offset), int(nbytes)
                    self._memory[path] = {"version": entry["version"], "tensors": tensors}
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                pass  # a cache: what is not there is computed again
        return self._memory


def _stat(path: str) -> os.stat_result:
    try:
        return Path(path).stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _version(stat: os.stat_result) -> str:
    """What is the same while a file was not written, and stays so over a copy of the disk."""
    return f"{stat.st_mtime_ns}:{stat.st_size}:{stat.st_ino}"


def _identity(stat: os.stat_result) -> Stat:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def identity(path: str | Path) -> Stat:
    """What changes whenever somebody writes to a file; OSError if it is gone."""
    return _identity(Path(path).stat())


def hash_all(wanted: Iterable[Key], progress: Told, halt: threading.Event) -> dict[Key, str]:
    """The hashes, several at once; ModelError if one cannot be read or `halt` is set. Says how fast it was."""
    keys = list(wanted)
    total, done, told, begun = sum(nbytes for _, _, nbytes in keys), 0, 0.0, time.monotonic()
    found: dict[Key, str] = {}
    with ThreadPoolExecutor(HASH_THREADS, thread_name_prefix="hash") as pool:
        try:
            results = pool.map(lambda key: hash_range(key[0], key[1], key[2], halt), keys)
            for key, sha256 in zip(keys, results, strict=True):
                found[key] = sha256
                done += key[2]
                if done == total or time.monotonic() - told >= PROGRESS_S:
                    told = time.monotonic()
                    progress(done, total)
        except BaseException:
            halt.set()
            raise
    seconds = time.monotonic() - begun
    if total >= WORTH_TELLING_BYTES and seconds:
        log.info("hashed %.0f MB of weights at %.1f GB/s", total / 1e6, total / 1e9 / seconds)
    return found


def hash_range(path: str | Path, offset: int, nbytes: int, halt: threading.Event | None = None) -> str:
    """SHA-256 of `nbytes` at `offset`; ModelError if the file is shorter or `halt` is set."""
    digest, left = hashlib.sha256(), nbytes
    try:
        with open_regular(path) as file:
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
