"""What clients do with the models on this disk: fetch one, give one another name, delete one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from peerllm.builtin import BUILTIN
from peerllm.daemon.control_messages import DiskModel
from peerllm.daemon.decide.model_names import ALIAS
from peerllm.daemon.deployment.model_files import HUB_ID, ModelOnDisk, Tell
from peerllm.daemon.facade import ANY_TAG, without_prefix
from peerllm.daemon.shelf.disk_models import DiskModels, places_on_disk, weight_files
from peerllm.daemon.threads import Progress
from peerllm.daemon.weights.known_models import KNOWN, all_names, known
from peerllm.daemon.weights.on_disk import Paths
from peerllm.errors import BadInputError, NotFoundError, OverloadedError
from peerllm.regular_files import read_regular
from peerllm.saved_files import disk_error, replace_file

FILE = "shelf.json"
MAX_FILE_BYTES = 1 << 20
MAX_ALIASES = 128
MAX_PULLS = 4  # models fetched at once
MAX_PULLED = 1024  # names remembered

PullProgress = Callable[[int, int], None]  # bytes done, bytes in all (0: not known)


class FetchingModels(Protocol):
    """How a model comes to this disk, as in deployment/negotiation.Surroundings."""

    def looked_up(self, model: str, tell: Tell) -> AbstractAsyncContextManager[ModelOnDisk]: ...

    async def resolve(self, model: str, progress: Progress, total_bytes: int) -> Path: ...


class ModelShelf:
    """`listed` are the models here, and other names for models of the household. `running` are names in lower case."""

    def __init__(
        self, data_dir: Path, files: FetchingModels, running: Callable[[], Iterable[str]], changed: Callable[[], None]
    ) -> None:
        self._data_dir, self._files, self._running, self._changed = data_dir, files, running, changed
        self.disk = DiskModels(data_dir, changed)
        self._aliases, self._pulled = _read(data_dir / FILE)
        self._turns: dict[str, asyncio.Lock] = {}

    @property
    def listed(self) -> tuple[DiskModel, ...]:
        self.disk.look()
        others = (DiskModel(name, model, 0, 0, alias=True) for name, model in self._aliases.items())
        return (*self.disk.listed, *others)

    async def pull(self, name: str, told: PullProgress) -> None:
        """Returns when the model is on this disk; NotFoundError, UnavailableError in one line. Cancelling ends it."""
        model = meant(name)
        if model.startswith(("/", "~", ".")) or (known(model) is None and not HUB_ID.fullmatch(model)):
            raise NotFoundError(f"{name[:200]!r} is no model that could be fetched: give owner/name or a short name")
        if model not in self._turns and len(self._turns) >= MAX_PULLS:
            raise OverloadedError(f"{MAX_PULLS} models are being fetched already; ask again later")
        turn = self._turns.setdefault(model, asyncio.Lock())
        try:
            async with turn:
                await self.disk.refresh()
                if not any(_is(one, model) for one in self.disk.listed):
                    await self._fetch(model, told)
        finally:
            if not turn.locked():
                self._turns.pop(model, None)

    async def _fetch(self, model: str, told: PullProgress) -> None:
        async with self._files.looked_up(model, lambda what, share: None) as found:
            one = known(model)
            size = found.missing_bytes or (one.download_bytes if one is not None else 0)
        told(0, size)
        await self._files.resolve(model, lambda share: told(int(share * size), size), found.missing_bytes)
        await self.disk.refresh()
        for there in self.disk.listed:
            if _is(there, model):
                self._pulled = [there.model, *(one for one in self._pulled if one != there.model)][:MAX_PULLED]
        await self._save()

    async def alias(self, name: str, model: str) -> None:
        """Let clients call `model` by this name, too; BadInputError for what is none, or is taken."""
        name = name.removesuffix(ANY_TAG)
        if not ALIAS.fullmatch(name):
            raise BadInputError(f"{name[:80]!r} is no name: up to 64 letters, digits and . _ - : + make one")
        taken = {*self._running(), *(other for one in self.disk.listed for other in all_names(one.name, one.model))}
        if name.lower() in taken:
            raise BadInputError(f"a model is called {name} already; choose another name")
        if name not in self._aliases and len(self._aliases) >= MAX_ALIASES:
            raise BadInputError(f"{MAX_ALIASES} other names are given already; delete one first")
        self._aliases[name] = model
        await self._save()
        self._changed()

    async def delete(self, name: str) -> None:
        """Delete another name, or a model that was fetched; BadInputError says why that is not done."""
        asked = name.removesuffix(ANY_TAG)
        alias = next((one for one in self._aliases if one.lower() == asked.lower()), None)
        if alias is not None:
            del self._aliases[alias]
            await self._save()
            self._changed()
            return
        await self.disk.refresh()
        there = next((one for one in self.disk.listed if _is(one, meant(name))), None)
        if there is None:
            raise NotFoundError(f"no model {name[:200]!r} is on this disk")
        if there.model == BUILTIN:
            raise BadInputError("builtin is a part of peerllm and cannot be deleted")
        if not all_names(there.name, there.model).isdisjoint(self._running()):
            raise BadInputError(f"{there.name} runs; `peerllm stop {there.name}` first")
        paths = (await asyncio.to_thread(places_on_disk, self._data_dir)).get(there.model, ())
        one = known(there.model)
        ours = one is not None and one.package is not None and paths == (one.package.path,)
        if not ours and there.model not in self._pulled:
            where = paths[0] if paths else "its place"
            raise BadInputError(f"{there.name} was not fetched by clients: its files at {where} are yours to delete")
        try:
            await asyncio.to_thread(_remove, paths)
        except OSError as error:
            raise disk_error(error, paths[0], f"what is left of {there.name}") from error
        self._pulled = [one for one in self._pulled if one != there.model]
        await self._save()
        await self.disk.refresh()

    async def _save(self) -> None:
        text = json.dumps({"aliases": self._aliases, "pulled": self._pulled})
        try:
            await asyncio.to_thread(replace_file, self._data_dir / FILE, text.encode())
        except OSError as error:
            raise disk_error(error, self._data_dir / FILE, "the names of models") from error

    async def close(self) -> None:
        """May be called twice."""
        await self.disk.close()


def meant(name: str) -> str:
    """What `run` would be told for what a client calls a model."""
    plain = name.removesuffix(ANY_TAG)
    called = without_prefix(plain.lower())
    return next((one.name for one in KNOWN if called in all_names(one.name, one.name)), plain)


def _is(one: DiskModel, model: str) -> bool:
    return model.lower() in {one.name.lower(), *all_names(one.name, one.model)}


def _remove(paths: Paths) -> None:
    """The weights, and what links of the hub's cache point at."""
    for path in paths:
        for file in weight_files(path):
            blob = file.resolve()
            file.unlink()
            if blob != file and blob.parent.name == "blobs":
                blob.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, str], list[str]]:
    try:
        said = json.loads(read_regular(path, MAX_FILE_BYTES))
        aliases = {str(name): str(model) for name, model in said["aliases"].items()}
        return dict(list(aliases.items())[:MAX_ALIASES]), [str(one) for one in said["pulled"]][:MAX_PULLED]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, []
