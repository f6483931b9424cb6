"""The models that lie whole on this disk, by the names that people call them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from peerllm.builtin import BUILTIN, MODEL_DIR
from peerllm.chat_templates import abilities, abilities_in
from peerllm.daemon.background_tasks import BackgroundTasks
from peerllm.daemon.control_messages import MAX_TIME_S, DiskModel
from peerllm.daemon.facade import short_name
from peerllm.daemon.weights.gguf.header import read_gguf
from peerllm.daemon.weights.known_models import KNOWN
from peerllm.daemon.weights.on_disk import (
    DIRECTORIES_FILE,
    Paths,
    holds_safetensors,
    in_hub_cache,
    model_at,
    served_directories,
)
from peerllm.errors import ModelError

OLD_S = 10.0  # seconds after which who asks has the disk looked at again
MAX_LISTED = 128

log = logging.getLogger(__name__)


def places_on_disk(data_dir: Path) -> dict[str, Paths]:
    """Short names where there are any, hub ids, and directories that were served: the files of each model."""
    short = {one.hub_id: one.name for one in KNOWN}
    places: dict[str, Paths] = {BUILTIN: (MODEL_DIR,)}
    places |= {one.name: (one.package.path,) for one in KNOWN if one.package is not None and one.package.here}
    places |= {short.get(name, name): paths for name, paths in in_hub_cache().items()}
    for name in served_directories(data_dir / DIRECTORIES_FILE):
        with contextlib.suppress(ModelError):
            places |= {name: paths} if (paths := model_at(Path(name))) else {}
    return places


class DiskModels:
    """`listed` tells what was found last; `look` has it looked for again, beside the loop."""

    def __init__(self, data_dir: Path, changed: Callable[[], None]) -> None:
        self.listed: tuple[DiskModel, ...] = ()
        self._data_dir, self._changed = data_dir, changed
        self._at = float("-inf")
        self._tasks = BackgroundTasks()

    def look(self) -> None:
        """Unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._at >= OLD_S:
            self._at = now
            self._tasks.start(self.refresh(), "look for models on this disk")

    async def refresh(self) -> None:
        """Returns when `listed` is true."""
        self._at = time.monotonic()
        before, self.listed = self.listed, await asyncio.to_thread(_found, self._data_dir)
        if self.listed != before:
            self._changed()

    async def close(self) -> None:
        """May be called twice."""
        await self._tasks.close()


def _found(data_dir: Path) -> tuple[DiskModel, ...]:
    """Each by the name that it would have when it runs, so that lists name it alike; of two, the second in full."""
    found, taken = [], set[str]()
    for model, paths in places_on_disk(data_dir).items():
        try:
            files = [one for path in paths for one in weight_files(path)]
            if files:
                about = [one.stat() for one in files]
                size, made = sum(one.st_size for one in about), max(int(one.st_mtime) for one in about)
                made = min(max(0, made), MAX_TIME_S)
                name = short if (short := short_name(model)).lower() not in taken else model
                taken.add(name.lower())
                found.append(DiskModel(name, model, size, made, abilities=_abilities(paths[0], made)))
        except OSError as error:
            log.debug("%s: %s", model, error)
    return tuple(found[:MAX_LISTED])


@lru_cache(MAX_LISTED)  # a large vocabulary takes a quarter of a second
def _abilities(path: Path, made: int) -> tuple[str, ...]:
    """Of a model's directory or GGUF file, which was made then."""
    if path.is_dir():
        return abilities_in(path)
    try:
        template = read_gguf(path).metadata.get("tokenizer.chat_template")
        return abilities(template if isinstance(template, str) else None)
    except ModelError:
        return ()


def weight_files(path: Path) -> list[Path]:
    """Of a model's directory, or the file itself."""
    if not path.is_dir():
        return [path]
    return list(path.glob("*.safetensors")) if holds_safetensors(path) else []
