"""A model directory for GGUF files, in Hugging Face layout without weights: tensors.json says where those lie."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson

from peerllm.daemon.facade import short_name
from peerllm.daemon.weights.gguf.header import GGUFHeader, read_gguf
from peerllm.daemon.weights.gguf.tokenizer_files import tokenizer_files
from peerllm.daemon.weights.gguf.translation import translate
from peerllm.engine.messages import TensorAt
from peerllm.errors import ModelError
from peerllm.stored_types import POOLING_FILE, TENSOR_LIST

FORM = 2  # of these directories: another number makes all of them anew
MOST_KEPT = 32  # directories, of some megabytes each; the longest unused go first
POOLING_MODES: Mapping[int, str] = {1: "mean_tokens", 2: "cls_token", 3: "lasttoken", 4: "rank"}  # by pooling_type


def model_directory(files: Sequence[Path], cache_root: Path) -> Path:
    """The directory for a model's files (see gguf_files), written once; ModelError says what is wrong with a file.

    It is called as the model is, so that a deployment is.
    """
    files = [file.absolute() for file in files]
    place = cache_root / _key(files)
    directory = place / short_name(files[0].name)
    if directory.is_dir():
        with contextlib.suppress(OSError):
            os.utime(place)  # used now
        return directory
    contents = _contents(_joined([read_gguf(file) for file in files]))
    try:
        cache_root.mkdir(parents=True, exist_ok=True)
        _write(contents, place, directory.name)
        _tidy(cache_root, place)
    except OSError as error:
        raise ModelError(f"the model's description cannot be written to {cache_root}: {error}") from error
    return directory


def _key(files: Sequence[Path]) -> str:
    about = []
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
        about.append(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}")
    return hashlib.sha256("\0".join([str(FORM), *about]).encode(errors="surrogateescape")).hexdigest()[:32]


def _joined(headers: Sequence[GGUFHeader]) -> GGUFHeader:
    """The parts of a split file as one."""
    first, tensors = headers[0], dict[str, TensorAt]()
    for place, header in enumerate(headers):
        number, count = header.metadata.get("split.no", 0), header.metadata.get("split.count") or 1
        if (number, count) != (place, len(headers)):
            raise ModelError(
                f"{header.path.name} is part {str(number)[:20]} of {str(count)[:20]} by its header (from 0), not "
                f"{place} of {len(headers)}; the parts of a model are called NAME-00001-of-00003.gguf and so on"
            )
        if twice := next((name for name in header.tensors if name in tensors), None):
            raise ModelError(f"{header.path.name} has the tensor {twice[:60]!r}, which an earlier part has too")
        tensors |= header.tensors
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if len(headers) > 1 and expected != len(tensors):
        raise ModelError(f"{first.path.name} and its further parts have {len(tensors)} tensors, not {expected}")
    return replace(first, tensors=tensors)


def _contents(header: GGUFHeader) -> dict[str, bytes]:
    translation = translate(header)
    return {
        **tokenizer_files(header.metadata),
        "config.json": _json(translation.config),
        "generation_config.json": _json(translation.generation),
        TENSOR_LIST: orjson.dumps([asdict(tensor) for tensor in translation.tensors]),
        **_pooling(header.metadata),
    }


def _pooling(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """How hidden states become one vector, where the file says so."""
    kind = metadata.get(f"{metadata.get('general.architecture')}.pooling_type", 0)
    if type(kind) is not int or kind == 0:
        return {}
    return {POOLING_FILE: _json({f"pooling_mode_{POOLING_MODES.get(kind, f'type_{kind}')}": True})}


def _json(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2)


def _write(contents: Mapping[str, bytes], place: Path, name: str) -> None:
    """Write all files and give them their place at once; who comes second finds it taken by the same."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".new-") as scratch:
        made = Path(scratch) / "made"
        (made / name).mkdir(parents=True)
        for file, content in contents.items():
            (made / name / file).parent.mkdir(exist_ok=True)
            (made / name / file).write_bytes(content)
        try:
            made.rename(place)
        except OSError:
            if not (place / name).is_dir():
                raise


def _tidy(root: Path, new: Path) -> None:
    """Remove the directories that were not used for longest."""
    places = sorted(root.glob("[!.]*"), key=lambda place: place.stat().st_mtime)
    for place in [one for one in places if one != new][: max(0, len(places) - MOST_KEPT)]:
        shutil.rmtree(place, ignore_errors=True)
