"""Models of the hub without their weights: small files, and weight files that are headers with a hole behind them.

A plan needs no more. Each device then fetches its own tensors; a model that was outlined once starts without the hub.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from peerllm.daemon.control_messages import HubFiles
from peerllm.daemon.decide.hub_places import HubPlaces, usable
from peerllm.daemon.weights.gguf.header import read_gguf
from peerllm.daemon.weights.gguf.translation import UNNAMED
from peerllm.daemon.weights.gguf_choice import chosen, gguf_models
from peerllm.daemon.weights.hub import ASK_TIMEOUT_S, WEIGHTS, WORKERS, Repository, api, token
from peerllm.daemon.weights.hub_errors import errors_of
from peerllm.daemon.weights.hub_header import weight_header, weight_part
from peerllm.errors import ModelError, PeerLLMError
from peerllm.saved_files import disk_error

ABOUT = "outline.json"
GGUF = "gguf"  # in an outline: the model directory that its GGUF files became
MAX_SMALL_BYTES = 256 << 20  # of tokenizer.json and its like
MAX_FILLED_IN_BYTES = 64 << 10
MOST_KEPT = 32  # outlines; the longest unused go first


class Outlines:
    """A directory of them; each is called by repository, commit and files, and has the model's name in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, found: Repository) -> Path:
        """The outline of what the hub has; ModelError or UnavailableError where there is none to be had."""
        if not usable(_origin(found.model, found.commit, found.sizes)):
            raise ModelError(f"{found.model} has weight files with names that are not passed on")
        place = self.root / found.model.replace("/", "--") / _key(found)
        if not (place / ABOUT).is_file():
            with errors_of(found.model):
                self._write(found, place)
        os.utime(place)
        self._tidy(place)
        return place

    def kept(self, model: str, tag: str) -> Path | None:
        """The newest outline of a model that there is, for where the hub does not answer."""
        places = list((self.root / model.replace("/", "--")).glob(f"*/{ABOUT}"))
        for about in sorted(places, key=lambda one: one.stat().st_mtime, reverse=True):
            origin = _about(about)
            ggufs = gguf_models(dict.fromkeys(origin.files, 0))
            try:
                if (tag and ggufs and chosen(model, ggufs, tag)) or (not tag and len(ggufs) <= 1):
                    return about.parent
            except PeerLLMError:
                continue
        return None

    def paths(self, place: Path) -> tuple[Path, ...]:
        """The model directory of an outline, or its GGUF files."""
        origin = _about(place / ABOUT)
        directory = next(one for one in place.iterdir() if one.is_dir() and one.name != GGUF)
        names = [name.rpartition("/")[2] for name in origin.files]
        return tuple(directory / name for name in names if name.lower().endswith(".gguf")) or (directory,)

    def holds(self, path: str) -> bool:
        """Whether the file at a path is one of an outline, and so has a header but no weights."""
        return path.startswith(f"{self.root}{os.sep}")

    def places(self, paths: Iterable[str]) -> HubPlaces | None:
        """What the files at these paths stand for, if they are of an outline."""
        for path in paths:
            if self.holds(path):
                place = self.root.joinpath(*Path(path).relative_to(self.root).parts[:2])
                origin = _about(place / ABOUT)
                own = {name.rpartition("/")[2]: number for number, name in enumerate(origin.files)}
                directory = self.paths(place)[0]
                directory = directory if directory.is_dir() else directory.parent
                return HubPlaces(origin, {str(directory / name): number for name, number in own.items()})
        return None

    def _write(self, found: Repository, place: Path) -> None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".new-") as scratch:
                made = Path(scratch) / "made"
                directory = made / found.model.rpartition("/")[2]  # a model is called as its directory is
                directory.mkdir(parents=True)
                self._fill(found, directory)
                kept = found.weights(directory) if found.gguf is None else list(found.gguf.files)
                origin = {"model": found.model, "commit": found.commit, "files": kept}
                (made / ABOUT).write_text(json.dumps(origin), encoding="utf-8")
                if not place.exists():
                    made.rename(place)
        except OSError as error:
            if error.filename is None:  # the hub's client
                raise
            raise disk_error(error, self.root, f"the outline of {found.model}") from error

    def _fill(self, found: Repository, directory: Path) -> None:
        for name in found.sizes:
            if not name.endswith(WEIGHTS):
                if found.sizes[name] > MAX_SMALL_BYTES:
                    raise ModelError(f"{name} of {found.model} is larger than {MAX_SMALL_BYTES} bytes")
                (directory / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(api().hf_hub_download(found.model, name, revision=found.commit), directory / name)
        weights = found.weights(directory) if found.gguf is None else found.gguf.files
        if not weights:
            raise ModelError(f"{found.model} has no weight files")
        header: Callable[[str], bytes] = lambda name: weight_header(  # noqa: E731
            found.model, name, found.commit, token(), ASK_TIMEOUT_S
        )
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="headers") as pool:
            for name, data in zip(weights, pool.map(header, weights), strict=True):
                path = directory / name.rpartition("/")[2]
                with path.open("wb") as file:
                    file.write(data)
                    file.truncate(max(len(data), found.sizes[name]))
                if found.gguf is not None:
                    _fill_in(found, name, path)

    def _tidy(self, new: Path) -> None:
        """Remove the outlines that were not used for longest."""
        places = sorted((one.parent for one in self.root.glob(f"*/*/{ABOUT}")), key=lambda one: one.stat().st_mtime)
        for place in [one for one in places if one != new][: max(0, len(places) - MOST_KEPT)]:
            shutil.rmtree(place, ignore_errors=True)


def _fill_in(found: Repository, name: str, path: Path) -> None:
    """Fetch the small tensors of a GGUF file that its translation reads."""
    tensors = read_gguf(path).tensors
    with path.open("r+b") as file:
        for tensor in (tensors[one] for one in UNNAMED if one in tensors):
            if tensor.nbytes > MAX_FILLED_IN_BYTES:
                continue  # the translation refuses it
            place = tensor.offset, tensor.nbytes
            data = weight_part(found.model, name, found.commit, token(), ASK_TIMEOUT_S, *place)
            file.seek(tensor.offset)
            file.write(data)


def _key(found: Repository) -> str:
    names = sorted(f"{name}:{size}" for name, size in found.sizes.items())
    return sha256("\0".join([found.commit, *names]).encode()).hexdigest()[:32]


def _origin(model: str, commit: str, sizes: Mapping[str, int]) -> HubFiles:
    return HubFiles(model, commit, tuple(name for name in sizes if name.endswith(WEIGHTS)))


@lru_cache(maxsize=MOST_KEPT)
def _about(file: Path) -> HubFiles:
    about = json.loads(file.read_text(encoding="utf-8"))
    return HubFiles(about["model"], about["commit"], tuple(about["files"]))
