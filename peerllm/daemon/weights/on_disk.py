"""Which models lie on this disk: those of the hub's cache, and the directories that were served before."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peerllm.daemon.weights.gguf.header import read_gguf
from peerllm.daemon.weights.gguf.split_files import gguf_files
from peerllm.daemon.weights.gguf_choice import SUFFIX, GgufModel, chosen, gguf_models, quantisation
from peerllm.errors import ModelError, PeerLLMError
from peerllm.regular_files import open_regular, read_regular
from peerllm.saved_files import replace_file

DIRECTORIES_FILE = "directories.txt"
MAX_DIRECTORIES = 64  # remembered, the last served first
MAX_HEADER_BYTES = 100 << 20  # of a safetensors file
MAX_CONFIG_BYTES = 64 << 20

Paths = tuple[Path, ...]  # a model: its directory, or its GGUF files


def in_hub_cache() -> dict[str, Paths]:
    """The models that the hub's cache holds whole, by what they are called: an id, of a GGUF model with its tag."""
    from huggingface_hub import constants

    found: dict[str, Paths] = {}
    for repository in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        name = repository.name.removeprefix("models--").replace("--", "/")
        directory = _snapshot(repository)
        if directory is not None and holds_safetensors(directory):
            found[name] = (directory,)
        if directory is not None:
            found |= {f"{name}:{one.tag}": _paths(directory, one) for one in _ggufs(directory)}
    return found


def cached(model: str, tag: str) -> Paths:
    """What the hub's cache holds of a model, chosen as hub.ask chooses among all that the hub has; () is nothing."""
    from huggingface_hub import constants

    directory = _snapshot(Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}")
    if directory is None:
        return ()
    if not tag and holds_safetensors(directory):
        return (directory,)
    try:
        return _paths(directory, chosen(model, _ggufs(directory), tag))
    except PeerLLMError:
        return ()


def _snapshot(repository: Path) -> Path | None:
    """The folder of the commit that was last downloaded as "main"."""
    try:
        commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return repository / "snapshots" / commit


def _ggufs(directory: Path) -> list[GgufModel]:
    files = [file for file in directory.rglob("*") if gguf_file(file)]
    return gguf_models({file.relative_to(directory).as_posix(): file.stat().st_size for file in files})


def _paths(directory: Path, model: GgufModel) -> Paths:
    return tuple(directory / file for file in model.files)


def gguf_file(path: Path) -> bool:
    """Whether a path names a GGUF file that is there."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def holds_safetensors(directory: Path) -> bool:
    """Whether there are a configuration and safetensors weights."""
    return (directory / "config.json").is_file() and any(one.is_file() for one in directory.glob("*.safetensors"))


def model_at(path: Path) -> Paths:
    """The model at a path: a model directory, or GGUF files, all parts of one; () where there is nothing to be read.

    ModelError where GGUF files do not make one model.
    """
    if gguf_file(path) or (path.is_dir() and _holds_gguf_alone(path)):
        return tuple(gguf_files(path))
    return (path,) if (path / "config.json").is_file() else ()


def _holds_gguf_alone(directory: Path) -> bool:
    """Whether there are GGUF files and no safetensors, which would go first."""
    return not holds_safetensors(directory) and any(gguf_file(one) for one in directory.glob("*"))


def note_directories(file: Path, served: Iterable[str]) -> None:
    """Remember these directories before those that the file names."""
    names = list(dict.fromkeys([*served, *served_directories(file)]))[:MAX_DIRECTORIES]
    replace_file(file, "".join(f"{name}\n" for name in names).encode())


def served_directories(file: Path) -> list[str]:
    """Those that the file names, the last served first; [] where there is none."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError):
        return []


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What a model's files hold, by their headers."""

    nbytes: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)  # numbers by type; {}: the files do not tell
    form: str = ""  # quantisation, or the type of most numbers
    stored: bool = False  # in a form that is computed as it is

    @property
    def numbers(self) -> int:
        return sum(self.counts.values())


def weights_of(paths: Paths) -> WeightFiles:
    """Of a model directory or of GGUF files; a damaged one holds no numbers."""
    counts: Counter[str] = Counter()
    files = [file for path in paths for file in (path.glob("*.safetensors") if path.is_dir() else (path,))]
    size = 0
    for file in files:
        try:
            size += file.stat().st_size
            counts.update(_gguf_numbers(file) if file.suffix.lower() == SUFFIX else _safetensors_numbers(file))
        except (ModelError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    if method := _published_as(paths[0] / "config.json"):  # a word of its files holds several weights
        return WeightFiles(size, {}, method, stored=True)
    most = max(counts, key=counts.__getitem__, default="")
    one = files[0] if files else Path()
    return WeightFiles(size, counts, quantisation(one.name) or most, one.suffix.lower() == SUFFIX)


def _published_as(config: Path) -> str:
    """How a checkpoint was rounded before it was published, by its config.json; "" if it was not."""
    try:
        return str(json.loads(read_regular(config, MAX_CONFIG_BYTES))["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _gguf_numbers(file: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for tensor in read_gguf(file).tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    return counts


def _safetensors_numbers(file: Path) -> Counter[str]:
    with open_regular(file) as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length)) if length <= MAX_HEADER_BYTES else {}
    counts: Counter[str] = Counter()
    for name, one in header.items():
        if name != "__metadata__":
            counts[one["dtype"]] += math.prod(one["shape"])
    return counts
