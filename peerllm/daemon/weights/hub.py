"""The Hugging Face hub: what a model's repository holds, known before its weights are on this disk; what is missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerllm.daemon.weights.gguf_choice import GgufModel, chosen, gguf_models
from peerllm.daemon.weights.hub_errors import errors_of, quietly
from peerllm.daemon.weights.hub_header import gguf_header
from peerllm.errors import ModelError, NotFoundError
from peerllm.stored_types import TENSOR_LIST
from peerllm.wrapped_models import WRAPPERS, text_tensor

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]  # never code, never pickles
NOT = ["*/*", TENSOR_LIST]  # other formats of the same weights lie in folders; a list would name files of this disk
WORKERS = 4  # files downloaded at once
ASK_TIMEOUT_S = 10.0
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG = "config.json"
SAID = (CONFIG, "generation_config.json", INDEX)  # what tells of a model, besides the headers of its weights


@dataclass(frozen=True, slots=True)
class Repository:
    """The files of a repository at one commit that make a model, by name, with their sizes in bytes.

    `gguf` is the GGUF model that was chosen among `choice`; None: the files are a model directory.
    """

    model: str
    commit: str
    sizes: Mapping[str, int]
    gguf: GgufModel | None = None
    choice: tuple[GgufModel, ...] = ()

    @property
    def missing_bytes(self) -> int:
        """What a download would fetch; 0: all files are on this disk."""
        return sum(size for name, size in self.sizes.items() if self._cached(name) is None)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The model directory or the GGUF files on this disk; () while one is missing."""
        found = [path for name in self.sizes if (path := self._cached(name)) is not None]
        if len(found) < len(self.sizes):
            return ()
        return tuple(found) if self.gguf is not None else (found[0].parent,)

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.model, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def weights(self, directory: Path) -> list[str]:
        """The safetensors files that a loader would read: those in which the index names a tensor that is needed.

        `directory` has the index, where there is one, and config.json: of a wrapper only the language model counts.
        """
        held = [name for name in self.sizes if name.endswith(".safetensors")]
        if not (directory / INDEX).is_file():
            return [SINGLE] if SINGLE in held else held
        try:
            index, config = (
                json.loads((directory / name).read_text(encoding="utf-8")) if name in self.sizes else {}
                for name in (INDEX, CONFIG)
            )
            wrapped = config.get("model_type") in list(WRAPPERS)
            named = {file for tensor, file in index["weight_map"].items() if not wrapped or text_tensor(tensor)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{INDEX} of {self.model} has no usable weight_map") from error
        return [name for name in held if name in named]


def ask(model: str, tag: str = "", timeout_s: float = ASK_TIMEOUT_S) -> Repository:
    """What the hub holds of a model now: with a tag the GGUF files that it means, else safetensors where there are any.

    One clear line where the hub cannot be asked (UnavailableError), does not show the model or does not have it.
    """
    with errors_of(model):
        info = _api().model_info(model, files_metadata=True, timeout=timeout_s)
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    plain = {name: size for name, size in sizes.items() if _wanted(name)}
    ggufs = gguf_models(sizes)
    commit = info.sha or ""
    if tag or (ggufs and not any(name.endswith(".safetensors") for name in plain)):
        one = chosen(model, ggufs, tag)
        return Repository(model, commit, {name: sizes[name] for name in one.files}, one, tuple(ggufs))
    if not plain:
        raise NotFoundError(f"{model} holds neither safetensors nor GGUF files")
    return _needed(Repository(model, commit, plain))


def _needed(found: Repository) -> Repository:
    """The files without the weights that no loader would read; all, where that cannot be told."""
    if sum(name.endswith(".safetensors") for name in found.sizes) < 2:
        return found
    with errors_of(found.model):
        told = [name for name in SAID if name in found.sizes]
        said = [_api().hf_hub_download(found.model, name, revision=found.commit) for name in told]
    try:
        weights = found.weights(Path(said[0]).parent) if said else []
    except ModelError:  # told where the model is read
        return found
    sizes = {name: size for name, size in found.sizes.items() if name in weights or not name.endswith(".safetensors")}
    return replace(found, sizes=sizes) if weights else found


def _wanted(name: str) -> bool:
    return any(fnmatch(name, one) for one in FILES) and not any(fnmatch(name, one) for one in NOT)


def outline(found: Repository, into: Path) -> tuple[Path, ...]:
    """Make, in the new folder `into`, a model directory or GGUF files without weights; () where that cannot be.

    Each weight file has its header and its true length (but for the header's spacing), and is a hole: it takes no
    room on the disk.
    """
    with quietly(found.model):
        into.mkdir()
        if found.gguf is None:
            return (into,) if _outline_directory(found, into) else ()
        made = [into / name.rpartition("/")[2] for name in found.gguf.files]
        for name, path in zip(found.gguf.files, made, strict=True):
            with path.open("wb") as file:
                file.write(gguf_header(found.model, name, found.commit, token(), ASK_TIMEOUT_S))
                file.truncate(max(file.tell(), found.sizes[name]))
        return tuple(made)
    return ()


def _outline_directory(found: Repository, into: Path) -> bool:
    api = _api()

    def header(name: str) -> tuple[str, dict[str, Any]]:
        said = api.parse_safetensors_file_metadata(found.model, name, revision=found.commit, timeout=ASK_TIMEOUT_S)
        return name, {
            key: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
            for key, one in said.tensors.items()
        }

    for name in SAID:
        if name in found.sizes:
            shutil.copyfile(api.hf_hub_download(found.model, name, revision=found.commit), into / name)
    weights = found.weights(into)
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="headers") as pool:
        for name, tensors in pool.map(header, weights):
            hole(into / name, tensors)
    return bool(weights)


def hole(path: Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file with this header, and no data: nothing but its length."""
    header = json.dumps(tensors).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + max((one["data_offsets"][1] for one in tensors.values()), default=0))


def token() -> str | None:
    return os.environ.get("HF_TOKEN") or None


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token())
