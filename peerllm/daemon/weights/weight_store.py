"""The cache of weights: tensors as files named by their SHA-256, fetched from wherever they are, checked, bounded.

What a deployment uses is never removed; of the rest the longest unused goes first when the owner's bound or the disk
asks for room. A file counts as good only after this process has hashed it: disks change bytes silently.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from peerllm.daemon.control_messages import HubFiles, TensorDigest
from peerllm.daemon.decide.hub_places import SHA256, hub_key
from peerllm.daemon.weights.digests import Stat, hash_all, hash_range, identity
from peerllm.daemon.weights.exchange.holders import WeightPeers
from peerllm.daemon.weights.exchange.hub_ranges import HubRanges
from peerllm.daemon.weights.exchange.known_hashes import KnownHashes
from peerllm.daemon.weights.exchange.tensor_fetch import HUB, TensorFetch
from peerllm.daemon.weights.exchange.wanted_tensor import WantedTensor, bytes_of
from peerllm.engine.messages import TensorAt
from peerllm.errors import DiskFullError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.saved_files import disk_error
from peerllm.types import DeploymentId, DeviceId

SPARE_DISK_BYTES = 256 << 20  # left free on the disk
MAX_STORE_BYTES = 100 << 30  # unless the owner says otherwise
EMPTY = hashlib.sha256().hexdigest()

Told = Callable[[int, int], None]  # bytes done, bytes in all

log = logging.getLogger(__name__)


class WeightStore:
    """`find`, `held` and `coming` say what is here; `fetch` gets what is not."""

    def __init__(self, directory: Path, me: DeviceId, peers: WeightPeers, max_bytes: int | None = None) -> None:
        self._directory, self._partial = directory, directory / "partial"
        self._me, self._peers = me, peers
        self._max_bytes = MAX_STORE_BYTES if max_bytes is None else max_bytes
        self._used: dict[DeploymentId, frozenset[str]] = {}
        self._coming: dict[str, tuple[asyncio.Future[None], WantedTensor]] = {}  # by key
        self._checked: dict[str, Stat] = {}  # by SHA-256: what this process has hashed
        self._known = KnownHashes(directory / "hub.txt")  # what this device itself had from the hub
        self._heard = KnownHashes(directory / "heard.txt")  # what others said of it, for the deployment it was said in
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # the disk is full: told where there is something to be fetched
            log.warning("%s", disk_error(error, directory, "the cache of weights"))

    def path(self, sha256: str) -> Path:
        return self._directory / sha256

    def keeps(self, tensor: TensorAt) -> bool:
        """Whether it lies in this store."""
        return Path(tensor.path).parent == self._directory

    def find(self, sha256: str) -> TensorAt | None:
        """Where a tensor of that hash lies; None if it is not here."""
        try:
            nbytes = self.path(sha256).stat().st_size if SHA256.fullmatch(sha256) else -1
        except OSError:
            return None
        return TensorAt("", "U8", (nbytes,), str(self.path(sha256)), 0, nbytes) if nbytes >= 0 else None

    def held(self, key: str) -> str:
        """The SHA-256 of a tensor that is here, by that or by its key on the hub; ""."""
        sha256 = self._known.get(key) or key
        return sha256 if self.find(sha256) is not None else ""

    def coming(self, key: str) -> bool:
        return key in self._coming

    def known(self, key: str) -> str:
        """The SHA-256 of a tensor by its key on the hub; "" until this device has fetched it from there."""
        return self._known.get(key)

    async def fetch(
        self,
        deployment: DeploymentId,
        source: DeviceId,
        tensors: Sequence[TensorDigest],
        progress: Told,
        hub: HubFiles | None = None,
        token: str | None = None,
    ) -> dict[str, TensorAt]:
        """Have all `tensors` on disk; where they lie, by name. What came stays for later, whatever is raised.

        `verify` tells whether those that were here before are still good.
        """
        scope = f"{deployment} {source}"
        wanted = {tensor.key: tensor for tensor in (self._wanted(tensor, hub, scope) for tensor in tensors)}
        self._used[deployment] = frozenset(wanted) | {tensor.sha256 for tensor in wanted.values()}
        missing = await asyncio.to_thread(self._missing, wanted.values())
        total = bytes_of(wanted.values())
        done = total - bytes_of(missing)
        progress(done, total)

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        while missing:
            mine = [tensor for tensor in missing if tensor.key not in self._coming]
            if mine:
                await self._fetch(mine, source, hub, token, count)
                await asyncio.to_thread(self._note, mine, scope)
            else:  # for another deployment
                await asyncio.wait({self._coming[tensor.key][0] for tensor in missing})
            before, missing = missing, await asyncio.to_thread(self._missing, missing)
            if not mine:
                count(bytes_of(before) - bytes_of(missing))
        self._used[deployment] = frozenset(tensor.sha256 for tensor in wanted.values())
        await asyncio.to_thread(self._touch, self._used[deployment])
        found = {tensor.name: wanted[self._key(tensor, hub)].sha256 for tensor in tensors}
        return {
            one.name: TensorAt(one.name, one.dtype, one.shape, str(self.path(found[one.name])), 0, one.nbytes)
            for one in tensors
        }

    async def verify(self, tensors: Iterable[TensorAt], progress: Told) -> list[str]:
        """Hash those that this process has not hashed yet; the names of damaged ones, which are removed."""
        loop, halt = asyncio.get_running_loop(), threading.Event()
        names = {tensor.path: tensor.name for tensor in tensors}

        def told(done: int, total: int) -> None:
            loop.call_soon_threadsafe(progress, done, total)

        try:
            return await asyncio.to_thread(self._verify, names, told, halt)
        finally:
            halt.set()

    def forget(self, deployment: DeploymentId) -> None:
        """The deployment is over: its tensors may be removed."""
        self._used.pop(deployment, None)

    async def prune(self) -> int:
        """Remove the longest unused tensors beyond the bound; the bytes freed."""
        return await asyncio.to_thread(self._prune, self._in_use(), 0, 0)

    # ---- fetching ------------------------------------------------------------------------------------------------

    @staticmethod
    def _key(tensor: TensorDigest, hub: HubFiles | None) -> str:
        if tensor.sha256 or hub is None:
            return tensor.sha256
        return hub_key(hub, tensor.file, tensor.offset, tensor.nbytes)

    def _wanted(self, digest: TensorDigest, hub: HubFiles | None, scope: str) -> WantedTensor:
        key = self._key(digest, hub)
        tensor = WantedTensor(digest, key, self._partial, self._known.get(key))
        if not tensor.sure:
            tensor.sha256 = self._heard.get(_heard_key(scope, key))
        return tensor

    def _note(self, tensors: Iterable[WantedTensor], scope: str) -> None:
        """Remember what others said of these tensors, for this deployment and its source."""
        for tensor in tensors:
            if not tensor.sure and self._heard.get(_heard_key(scope, tensor.key)) != tensor.sha256:
                self._heard.add(_heard_key(scope, tensor.key), tensor.sha256)

    def _missing(self, wanted: Iterable[WantedTensor]) -> list[WantedTensor]:
        missing = []
        for tensor in wanted:
            if not tensor.sure and (known := self._known.get(tensor.key)):
                tensor.sha256, tensor.sure = known, True
            if not self._here(tensor):
                missing.append(tensor)
        return missing

    def _here(self, tensor: WantedTensor) -> bool:
        found = self.find(tensor.sha256)
        return found is not None and found.nbytes == tensor.nbytes

    async def _fetch(
        self,
        missing: Sequence[WantedTensor],
        source: DeviceId,
        hub: HubFiles | None,
        token: str | None,
        count: Callable[[int], None],
    ) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._coming |= {tensor.key: (done, tensor) for tensor in missing}
        ranges = HubRanges(hub, token) if hub is not None else None
        try:
            await asyncio.to_thread(self._check_room, missing, self._in_use())
            count(await asyncio.to_thread(lambda: sum(tensor.resume() for tensor in missing)))
            fetch = TensorFetch(self._me, source, missing, self._peers, ranges, self._finish, count, self._here)
            await fetch.run()
        except OSError as error:
            if error.errno is None:  # an error of ours, which is an OSError too
                raise
            raise disk_error(error, self._directory, "weights") from error
        finally:
            for tensor in missing:
                self._coming.pop(tensor.key, None)
            done.set_result(None)
            if ranges is not None:
                await ranges.close()

    async def _finish(self, tensor: WantedTensor) -> bool:
        """A tensor's bytes are complete: keep them if they are the right ones."""
        sha256 = await asyncio.to_thread(hash_range, tensor.path, 0, tensor.nbytes) if tensor.nbytes else EMPTY
        of_hub = not tensor.digest.sha256 and (not tensor.sha256 or tensor.senders == {HUB})
        if tensor.sha256 != sha256:
            if not of_hub:
                return False
            if tensor.sha256:
                log.warning("the hub's bytes of tensor %s are others than was said of them", tensor.digest.name)
        await asyncio.to_thread(self._keep, tensor, sha256, of_hub)
        return True

    def _keep(self, tensor: WantedTensor, sha256: str, of_hub: bool) -> None:
        """Put a tensor in its place; `of_hub`: this device had all of it from there, and knows its hash from now on."""
        place = self.path(sha256)
        if not tensor.nbytes:
            tensor.path.touch()
        tensor.path.replace(place)
        self._checked[sha256] = identity(place)
        tensor.sha256, tensor.sure = sha256, tensor.sure or of_hub
        if of_hub:
            self._known.add(tensor.key, sha256)

    def _touch(self, used: Iterable[str]) -> None:
        """They were used now: removed last. That changes a file's times, but not what was found of it."""
        for sha256 in used:
            try:
                before = identity(self.path(sha256))
                os.utime(self.path(sha256))
                if self._checked.get(sha256) == before:
                    self._checked[sha256] = identity(self.path(sha256))
            except OSError:  # told by whoever loads it
                continue

    def _verify(self, names: dict[str, str], progress: Told, halt: threading.Event) -> list[str]:
        wanted, damaged = dict[str, Stat](), list[str]()
        for path in names:
            try:
                now = identity(path)
            except OSError:
                damaged.append(path)
                continue
            if self._checked.get(Path(path).name) != now:
                wanted[path] = now
        found = hash_all(((path, 0, stat[1]) for path, stat in wanted.items()), progress, halt)
        for (path, _, _), sha256 in found.items():
            if sha256 == Path(path).name:
                self._checked[sha256] = wanted[path]
            else:
                damaged.append(path)
        for path in damaged:
            log.warning("tensor %s changed on this disk (%s); it is removed and fetched again", names[path], path)
            self._checked.pop(Path(path).name, None)
            Path(path).unlink(missing_ok=True)
        return [names[path] for path in damaged]

    # ---- room ----------------------------------------------------------------------------------------------------

    def _in_use(self) -> frozenset[str]:
        partial = (tensor.path.name for _, tensor in self._coming.values())
        return frozenset[str]().union(self._coming, partial, *self._used.values())

    def _check_room(self, missing: Sequence[WantedTensor], used: frozenset[str]) -> None:
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            partial = sum(file.stat().st_size for file in self._partial.iterdir() if file.name in used)
            needed = max(0, bytes_of(missing) - partial)
            free = shutil.disk_usage(self._directory).free - SPARE_DISK_BYTES
            self._prune(used, needed, max(0, needed - free))
            left = self._max_bytes - sum(stat.st_size for stat, _ in self._files())
            free = shutil.disk_usage(self._directory).free - SPARE_DISK_BYTES
        except OSError as error:
            raise disk_error(error, self._directory, "weights") from error
        if needed > left:
            raise DiskFullError(
                f"{human_bytes(needed)} of weights do not fit this device's cache, which may take "
                f"{human_bytes(self._max_bytes)}; allow more with --cache, or stop another model"
            )
        if needed > free:
            short, all_of_it = human_bytes(needed - free), human_bytes(needed)
            raise DiskFullError(
                f"the disk lacks {short} for {all_of_it} of weights at {self._directory}; free some space"
            )

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        found = []
        for folder in (self._directory, self._partial):
            for file in folder.iterdir():
                if SHA256.fullmatch(file.name):
                    try:
                        found.append((file.stat(), file))
                    except FileNotFoundError:
                        continue
        return found

    def _prune(self, used: frozenset[str], needed: int, short: int) -> int:
        """Remove until `needed` more bytes keep the bound and `short` bytes are free."""
        try:
            stats = sorted(self._files(), key=lambda pair: pair[0].st_mtime)
        except OSError as error:
            log.warning("the cache of weights cannot be read: %s", error)
            return 0
        total, freed = sum(stat.st_size for stat, _ in stats), 0
        for stat, file in stats:
            if total - freed + needed <= self._max_bytes and freed >= short:
                break
            if file.name not in used:
                file.unlink(missing_ok=True)
                freed += stat.st_size
        return freed


def _heard_key(scope: str, key: str) -> str:
    """Under what it is remembered that a tensor's hash was said in a deployment."""
    return hashlib.sha256(f"{scope} {key}".encode()).hexdigest()
