"""Which models lie on this disk: those of the hub's cache, and the directories that were served before."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

DIRECTORIES_FILE = "directories.txt"
MAX_DIRECTORIES = 64  # remembered, the last served first
MAX_HEADER_BYTES = 100 << 20  # of a safetensors file


def in_hub_cache() -> list[tuple[str, Path]]:
    """(id, directory) of the models that the hub's cache holds with their weights, by id."""
    from huggingface_hub import constants

    found = []
    for repository in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        try:
            commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        directory = repository / "snapshots" / commit
        if holds_model(directory):
            found.append((repository.name.removeprefix("models--").replace("--", "/"), directory))
    return found


def holds_model(directory: Path) -> bool:
    """Whether there are a configuration and weights."""
    return (directory / "config.json").is_file() and any(one.is_file() for one in directory.glob("*.safetensors"))


def note_directories(file: Path, served: Iterable[str]) -> None:
    """Remember these directories before those that the file names."""
    names = list(dict.fromkeys([*served, *served_directories(file)]))[:MAX_DIRECTORIES]
    scratch = file.with_suffix(".new")
    scratch.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    scratch.replace(file)


def served_directories(file: Path) -> list[str]:
    """Those that the file names, the last served first; [] where there is none."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError):
        return []


def weights_of(directory: Path) -> tuple[int, int]:
    """(bytes, numbers) of a directory's weight files, by their headers; a damaged one holds no numbers."""
    size = numbers = 0
    for file in directory.glob("*.safetensors"):
        try:
            size += file.stat().st_size
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length)) if length <= MAX_HEADER_BYTES else {}
            numbers += sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return size, numbers
