"""The Hugging Face hub: what a model's repository holds, known before its weights are on this disk; what is missing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerllm.daemon.weights.hub_errors import quietly
from peerllm.errors import ModelError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]  # never code, never pickles
NOT = ["*/*"]  # other formats of the same weights lie in folders
WORKERS = 4  # files downloaded at once
ASK_TIMEOUT_S = 10.0
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SAID = ("config.json", "generation_config.json", INDEX)  # what tells of a model, besides the headers of its weights


@dataclass(frozen=True, slots=True)
class Repository:
    """A model's files at one commit, by name, with their sizes in bytes."""

    model: str
    commit: str
    sizes: Mapping[str, int]

    @property
    def missing_bytes(self) -> int:
        """What a download would fetch; 0: all files are on this disk."""
        return sum(size for name, size in self.sizes.items() if self._cached(name) is None)

    @property
    def directory(self) -> Path | None:
        """Where the files lie; None while one is missing."""
        found = [self._cached(name) for name in self.sizes]
        return found[0].parent if found and found[0] is not None and None not in found else None

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.model, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def weights(self, index: Path) -> list[str]:
        """The weight files that a loader would read: those that the index names, where there is one."""
        held = [name for name in self.sizes if name.endswith(".safetensors")]
        if index.is_file():
            try:
                named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{INDEX} of {self.model} has no usable weight_map") from error
            return [name for name in held if name in named]
        return [SINGLE] if SINGLE in held else held


def ask(model: str) -> Repository | None:
    """What the hub holds of a model now; None where it cannot be asked, or does not show it."""
    with quietly(model):
        info = _api().model_info(model, files_metadata=True, timeout=ASK_TIMEOUT_S)
        sizes = {one.rfilename: one.size or 0 for one in info.siblings or () if _wanted(one.rfilename)}
        return Repository(model, info.sha, sizes) if info.sha and sizes else None
    return None


def _wanted(name: str) -> bool:
    return any(fnmatch(name, one) for one in FILES) and not any(fnmatch(name, one) for one in NOT)


def outline(found: Repository, into: Path) -> bool:
    """Make the folder `into`, a model directory without weights: config and headers; False where that cannot be.

    Each weight file has its true length but for its header's spacing, and is a hole: it takes no room on the disk.
    """
    api = _api()

    def header(name: str) -> tuple[str, dict[str, Any]]:
        said = api.parse_safetensors_file_metadata(found.model, name, revision=found.commit, timeout=ASK_TIMEOUT_S)
        return name, {
            key: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
            for key, one in said.tensors.items()
        }

    with quietly(found.model):
        into.mkdir()
        for name in SAID:
            if name in found.sizes:
                shutil.copyfile(api.hf_hub_download(found.model, name, revision=found.commit), into / name)
        weights = found.weights(into / INDEX)
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="headers") as pool:
            for name, tensors in pool.map(header, weights):
                hole(into / name, tensors)
        return bool(weights)
    return False


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
