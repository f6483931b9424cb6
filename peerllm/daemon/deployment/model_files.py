"""From what a person calls a model to a directory of its files: built in, on disk, or from the Hugging Face hub."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from peerllm.builtin import MODEL_DIR
from peerllm.daemon.weights import hub
from peerllm.daemon.weights.hub_download import download
from peerllm.daemon.weights.known_models import BUILTIN, hub_id, suggestion
from peerllm.errors import ModelError, NotFoundError

BUILTIN_DTYPE = "float32"  # exact whatever its file holds
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")

Progress = Callable[[float], None]  # 0 to 1


@dataclass(frozen=True, slots=True)
class ModelOnDisk:
    """A directory that tells what a model holds; while `missing_bytes` are to be downloaded, it has no weights."""

    directory: Path
    missing_bytes: int = 0


def dtype_of(model: str, dtype: str) -> str:
    """The compute dtype to ask the engine for."""
    return BUILTIN_DTYPE if model == BUILTIN else dtype


@asynccontextmanager
async def looked_up(model: str) -> AsyncIterator[ModelOnDisk]:
    """What is needed to plan for a model, for as long as the block runs; its weights are not downloaded for that.

    Where the hub does not show them without a download, they are downloaded. One clear line when it cannot be had.
    """
    directory = await asyncio.to_thread(_local, model)
    if directory is not None:
        yield ModelOnDisk(directory)
        return
    name = hub_id(model)
    with tempfile.TemporaryDirectory(prefix="peerllm-outline-") as scratch:
        outline = Path(scratch) / name.rpartition("/")[2]  # a model is called as its directory is
        found = await asyncio.to_thread(hub.ask, name)
        if found is not None and (directory := found.directory) is not None:
            yield ModelOnDisk(directory)
        elif found is not None and await asyncio.to_thread(hub.outline, found, outline):
            yield ModelOnDisk(outline, found.missing_bytes)
        else:
            yield ModelOnDisk(await resolve(model, lambda share: None))


async def resolve(model: str, progress: Progress, total_bytes: int = 0) -> Path:
    """The directory that holds `model`, downloaded first if it is a hub id; one clear line when it cannot be had.

    `total_bytes`: what is missing of it on this disk, where that is known.
    """
    directory = await asyncio.to_thread(_local, model)
    if directory is not None:
        return directory
    loop, halt = asyncio.get_running_loop(), threading.Event()

    def told(share: float) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(progress, share)

    try:
        return await asyncio.to_thread(download, hub_id(model), told, total_bytes, halt)
    finally:
        halt.set()


def _local(model: str) -> Path | None:
    """Where it lies on this disk, if it was not named as the hub does; NotFoundError for what is no name at all."""
    if model == BUILTIN:
        return Path(MODEL_DIR)
    path = Path(model).expanduser()
    # A relative name is an id: where the daemon happens to run must not decide what it means.
    if path.is_absolute() and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json: give a model directory in Hugging Face layout")
        return path.resolve()
    if not HUB_ID.fullmatch(model) or ".." in model:
        raise NotFoundError(f"{model}: no such directory, and no Hugging Face id (owner/name){suggestion(model)}")
    return None
