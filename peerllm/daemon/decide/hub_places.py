"""Where tensors lie on the Hugging Face hub, as devices tell each other: no address, each part checked. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from peerllm.daemon.control_messages import HubFiles, TensorDigest
from peerllm.errors import BadInputError

MAX_FILES = 1000  # of one model
MAX_OFFSET = 1 << 62
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")  # of a tensor's bytes, or of its place
COMMIT = re.compile(r"[0-9a-f]{40}")
FILE = re.compile(r"(?:[A-Za-z0-9_][\w.+-]{0,127}/){0,4}[A-Za-z0-9_][\w.+-]{0,191}\.(?:safetensors|gguf)", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubPlaces:
    """The files of a model that lies on the hub: as other devices are told, and which one each path stands for here."""

    origin: HubFiles
    files: Mapping[str, int]


def hub_key(hub: HubFiles, file: int, offset: int, nbytes: int) -> str:
    """What a tensor is called while nobody knows its SHA-256: a hash of its place on the hub."""
    place = "\0".join(("hub", hub.model, hub.commit, hub.files[file], f"{offset}:{nbytes}"))
    return hashlib.sha256(place.encode()).hexdigest()


def usable(hub: HubFiles) -> bool:
    """Whether it names a repository, a commit and weight files, and nothing else."""
    named = REPOSITORY.fullmatch(hub.model) and ".." not in hub.model and COMMIT.fullmatch(hub.commit)
    return bool(named) and 1 <= len(hub.files) <= MAX_FILES and all(map(FILE.fullmatch, hub.files))


def check_hub(hub: HubFiles | None) -> None:
    """BadInputError unless another device names what the hub may be asked for."""
    if hub is not None and not usable(hub):
        raise BadInputError("no repository, commit and weight files of the Hugging Face hub")


def check_place(hub: HubFiles | None, tensor: TensorDigest) -> None:
    """BadInputError if a tensor is said to lie where the hub cannot have it."""
    files = len(hub.files) if hub is not None else 0
    if not -1 <= tensor.file < files or not 0 <= tensor.offset < MAX_OFFSET:
        raise BadInputError(f"tensor {tensor.name} has no place in the files of the hub")
