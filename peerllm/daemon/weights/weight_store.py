"""The fetching side: tensors as files named by their SHA-256, fetched in ranges, resumed after a cut, checked."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import aiofiles
import aiofiles.os

from peerllm.daemon.control_messages import TensorDigest
from peerllm.daemon.weights.offers import offer_path
from peerllm.errors import LinkError, ModelError, RefusedError, UnavailableError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import DeploymentId, DeviceId

MAX_FETCHES = 4  # tensors fetched at once
MAX_CUTS = 6  # connections lost in a row, without one byte between them, before a fetch fails
CUT_WAIT_S = 0.25  # before the first new try; doubles each time
WRITE_BYTES = 1 << 20  # gathered before it is hashed and written
SPARE_DISK_BYTES = 256 << 20  # left free on the disk
MAX_STORE_BYTES = 100 << 30  # tensors no deployment uses are kept up to this sum; the longest unused go first

Get = Callable[[DeviceId, str, int, int], AsyncIterator[bytes]]  # device, path, offset, length


class WeightStore:
    """A directory of tensors. What a deployment uses is never pruned."""

    def __init__(self, directory: Path, get: Get, max_bytes: int = MAX_STORE_BYTES) -> None:
        self._directory = directory
        self._partial = directory / "partial"
        self._get = get
        self._max_bytes = max_bytes
        self._used: dict[DeploymentId, frozenset[str]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._partial.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self._directory / sha256

    async def fetch(
        self,
        deployment: DeploymentId,
        source: DeviceId,
        tensors: Sequence[TensorDigest],
        progress: Callable[[int, int], None],
    ) -> None:
        """Have all `tensors` on disk, whole and checked. Raises what went wrong; what came so far is kept for later."""
        wanted = {tensor.sha256: tensor for tensor in tensors}
        self._used[deployment] = frozenset(wanted)
        held = {sha for sha, tensor in wanted.items() if await self._size(self.path(sha)) == tensor.nbytes}
        missing = [tensor for sha, tensor in wanted.items() if sha not in held]
        total = sum(tensor.nbytes for tensor in wanted.values())
        done = total - sum(tensor.nbytes for tensor in missing)
        await self._check_disk(missing)
        progress(done, total)

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        turns = asyncio.Semaphore(MAX_FETCHES)

        async def one(tensor: TensorDigest) -> None:
            async with turns:
                await self._one(deployment, source, tensor, count)

        try:
            async with asyncio.TaskGroup() as group:
                for tensor in missing:
                    group.create_task(one(tensor), name=f"fetch {tensor.name}")
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        for sha in held:
            await asyncio.to_thread(os.utime, self.path(sha))  # used now: pruned last
        if missing:
            await self.prune()

    def forget(self, deployment: DeploymentId) -> None:
        """The deployment is over: its tensors may be pruned."""
        self._used.pop(deployment, None)

    async def prune(self) -> int:
        """Remove the longest unused tensors beyond the bound; the bytes freed."""
        used = frozenset[str]().union(*self._used.values())
        return await asyncio.to_thread(self._prune, used)

    def _prune(self, used: frozenset[str]) -> int:
        files = [file for folder in (self._directory, self._partial) for file in folder.iterdir() if file.is_file()]
        stats = sorted(((file.stat(), file) for file in files), key=lambda pair: pair[0].st_mtime)
        total, freed = sum(stat.st_size for stat, _ in stats), 0
        for stat, file in stats:
            if total - freed <= self._max_bytes:
                break
            if file.name not in used:
                file.unlink(missing_ok=True)
                freed += stat.st_size
        return freed

    async def _check_disk(self, missing: Sequence[TensorDigest]) -> None:
        needed = sum(tensor.nbytes for tensor in missing)
        free = (await asyncio.to_thread(shutil.disk_usage, self._directory)).free - SPARE_DISK_BYTES
        if needed > free:
            short, all_of_it = human_bytes(needed - free), human_bytes(needed)
            raise RefusedError(
                f"the disk lacks {short} for {all_of_it} of weights at {self._directory}; free some space"
            )

    async def _one(
        self, deployment: DeploymentId, source: DeviceId, tensor: TensorDigest, count: Callable[[int], None]
    ) -> None:
        lock = self._locks.setdefault(tensor.sha256, asyncio.Lock())
        async with lock:
            if await self._size(self.path(tensor.sha256)) == tensor.nbytes:
                count(tensor.nbytes)  # another deployment has just fetched it
                return
            for again in (True, False):
                if await self._complete(deployment, source, tensor, count):
                    return
                count(-tensor.nbytes)
                if not again:
                    raise ModelError(
                        f"tensor {tensor.name} came twice with other bytes than the source announced; "
                        "check the model's files there"
                    )

    async def _complete(
        self, deployment: DeploymentId, source: DeviceId, tensor: TensorDigest, count: Callable[[int], None]
    ) -> bool:
        """Continue the partial file to its end; False (and no file) if the bytes are not those announced."""
        partial = self._partial / tensor.sha256
        async with aiofiles.open(partial, "a+b") as file:
            transfer = _Transfer(file, tensor, count)
            await transfer.resume()
            cuts = 0
            while transfer.have < tensor.nbytes:
                before, reason = transfer.have, "the source ended early"
                left = tensor.nbytes - before
                try:
                    blocks = self._get(source, offer_path(deployment, tensor.sha256), before, left)
                    await transfer.receive(blocks)
                except (LinkError, OSError, TimeoutError) as error:
                    reason = str(error) or type(error).__name__
                cuts = 0 if transfer.have > before else cuts + 1
                if cuts >= MAX_CUTS:
                    raise UnavailableError(f"weights cannot be fetched: {reason}")
                if transfer.have < tensor.nbytes:
                    await asyncio.sleep(CUT_WAIT_S * 2**cuts)
            await transfer.sync()
        if transfer.sha256 != tensor.sha256:
            await aiofiles.os.remove(partial)
            return False
        await aiofiles.os.replace(partial, self.path(tensor.sha256))
        return True

    @staticmethod
    async def _size(path: Path) -> int:
        try:
            return (await aiofiles.os.stat(path)).st_size
        except FileNotFoundError:
            return -1


class _Transfer:
    """A partial file and the hash of exactly what it holds."""

    def __init__(self, file: Any, tensor: TensorDigest, count: Callable[[int], None]) -> None:
        self._file, self._tensor, self._count = file, tensor, count
        self._digest = hashlib.sha256()
        self.have = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    async def resume(self) -> None:
        """Hash what an earlier fetch left; start afresh if that is more than the tensor has."""
        await self._file.seek(0, os.SEEK_END)
        if await self._file.tell() > self._tensor.nbytes:
            await self._file.truncate(0)
        await self._file.seek(0)
        while block := await self._file.read(WRITE_BYTES):
            await self._take(block)

    async def receive(self, blocks: AsyncIterator[bytes]) -> None:
        """Append what one request brings; whatever ends it, nothing that came is lost."""
        gathered = bytearray()
        try:
            async for block in blocks:
                gathered += block
                if self.have + len(gathered) > self._tensor.nbytes:
                    gathered.clear()
                    raise LinkError(f"the source sends more than tensor {self._tensor.name} holds")
                if len(gathered) >= WRITE_BYTES:
                    data = bytes(gathered)
                    gathered.clear()
                    await self._file.write(data)
                    await self._take(data)
        finally:
            close = getattr(blocks, "aclose", None)
            if close is not None:
                await close()
            if gathered:
                await self._file.write(bytes(gathered))
                await self._take(bytes(gathered))

    async def sync(self) -> None:
        await self._file.flush()
        await asyncio.to_thread(os.fsync, self._file.fileno())

    async def _take(self, data: bytes) -> None:
        await asyncio.to_thread(self._digest.update, data)
        self.have += len(data)
        self._count(len(data))
