"""Which GGUF files make one model: a file, the parts of a split one, or what a directory holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from peerllm.daemon.weights.gguf_choice import BESIDE, SUFFIX
from peerllm.errors import ModelError

PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
MAX_PARTS = 1000
MOST_LISTED = 12  # files in a message


def gguf_files(path: Path) -> list[Path]:
    """The files of the model at `path` in order: a .gguf file, any part of a split one, or a directory with one model.

    ModelError names missing parts, or the models that a directory holds.
    """
    if path.is_dir():
        return _parts(_only_model(path))
    if not path.is_file() and PART.fullmatch(path.name) is None:
        raise ModelError(f"{path} is no file")
    return _parts(path)


def one_of_each(names: Iterable[str]) -> list[str]:
    """The first file of each model among names of files, in order; BESIDE are no models."""
    models: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        if name.lower().endswith(SUFFIX) and not BESIDE.search(name.rpartition("/")[2]):
            found = PART.fullmatch(name)
            models.setdefault((found["name"], found["count"]) if found else (name, ""), name)
    return list(models.values())


def _only_model(directory: Path) -> Path:
    names = one_of_each(entry.name for entry in directory.iterdir() if entry.is_file())
    if not names:
        raise ModelError(f"{directory} holds no .gguf files")
    if len(names) > 1:
        more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
        raise ModelError(
            f"{directory} holds several models: {', '.join(names[:MOST_LISTED])}{more}; name the file that is meant, "
            f"as {directory / names[0]}"
        )
    return directory / names[0]


def _parts(path: Path) -> list[Path]:
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    if not 1 <= int(found["number"]) <= count <= MAX_PARTS:
        raise ModelError(f"{path.name} is called part {int(found['number'])} of {count}, which cannot be")
    end = path.name[found.end("count") :]
    names = [f"{found['name']}-{number:05}-of-{found['count']}{end}" for number in range(1, count + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        more = f" and {len(missing) - MOST_LISTED} more" if len(missing) > MOST_LISTED else ""
        raise ModelError(f"{path.parent} lacks parts of this model: {', '.join(missing[:MOST_LISTED])}{more}")
    return [path.parent / name for name in names]
