"""The Hugging Face hub: what a model's repository holds, known before its weights are on this disk; what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from peerllm.daemon.weights.gguf_choice import GgufModel, chosen, gguf_models
from peerllm.daemon.weights.hub_errors import errors_of
from peerllm.errors import ModelError, NotFoundError
from peerllm.stored_types import POOLING_FILE, TENSOR_LIST
from peerllm.wrapped_models import WRAPPERS, text_tensor

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]  # never code, never pickles
NOT = [
    "*/*",
    TENSOR_LIST,
]  # but POOLING_FILE: other formats of the same weights lie in folders; a list would name files of this disk
WORKERS = 4  # files downloaded at once
ASK_TIMEOUT_S = 10.0
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG = "config.json"
SAID = (CONFIG, "generation_config.json", INDEX)  # what tells of a model, besides the headers of its weights
WEIGHTS = (".safetensors", ".gguf")


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
    shared: bool = True  # everyone may have it: no terms to be accepted, no owner to be known

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
        if self.gguf is not None:
            return tuple(found)
        return (next(path for name, path in zip(self.sizes, found, strict=True) if "/" not in name).parent,)

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
        info = api().model_info(model, files_metadata=True, timeout=timeout_s)
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    plain = {name: size for name, size in sizes.items() if _wanted(name)}
    ggufs = gguf_models(sizes)
    commit, shared = info.sha or "", not info.gated and not info.private
    if tag or (ggufs and not any(name.endswith(".safetensors") for name in plain)):
        one = chosen(model, ggufs, tag)
        return Repository(model, commit, {name: sizes[name] for name in one.files}, one, tuple(ggufs), shared)
    if not plain:
        raise NotFoundError(f"{model} holds neither safetensors nor GGUF files")
    return _needed(Repository(model, commit, plain, shared=shared))


def _needed(found: Repository) -> Repository:
    """The files without the weights that no loader would read; all, where that cannot be told."""
    if sum(name.endswith(".safetensors") for name in found.sizes) < 2:
        return found
    with errors_of(found.model):
        told = [name for name in SAID if name in found.sizes]
        said = [api().hf_hub_download(found.model, name, revision=found.commit) for name in told]
    try:
        weights = found.weights(Path(said[0]).parent) if said else []
    except ModelError:  # told where the model is read
        return found
    sizes = {name: size for name, size in found.sizes.items() if name in weights or not name.endswith(".safetensors")}
    return replace(found, sizes=sizes) if weights else found


def _wanted(name: str) -> bool:
    return name == POOLING_FILE or (
        any(fnmatch(name, one) for one in FILES) and not any(fnmatch(name, one) for one in NOT)
    )


def token() -> str | None:
    return os.environ.get("HF_TOKEN") or None


def api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token())
