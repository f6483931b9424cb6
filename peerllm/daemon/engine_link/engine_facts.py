"""What an engine last said of itself, on disk, so that its daemon can introduce the device without starting one."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from peerllm import __version__
from peerllm.codec import decode, encode
from peerllm.daemon.engine_link.machine import hardware
from peerllm.engine.messages import Configured
from peerllm.errors import LinkError
from peerllm.saved_files import replace_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _SavedFacts:
    key: str
    configured: Configured


def recall(file: Path, threads: int) -> Configured | None:
    """What is known of the engine that would start now; None if hardware, threads or a library changed, or nothing is.

    Blocking. An accelerator is never recalled: how much of its memory is free must be true now.
    """
    try:
        saved: _SavedFacts = decode(file.read_bytes(), _SavedFacts)
    except (OSError, LinkError):
        return None  # none yet, damaged, or of another version
    known = saved.configured
    holds = saved.key == _key(threads) and all(_version(name) == said for name, said in known.versions.items())
    return known if holds and known.place == "cpu" and not known.memory_bytes else None


def save(file: Path, threads: int, configured: Configured) -> None:
    """Blocking; a failure is told in the log."""
    try:
        replace_file(file, encode(_SavedFacts(_key(threads), configured), _SavedFacts))
    except OSError as error:
        log.warning("what the engine can do is not kept for the next start: %s", error)


def _key(threads: int) -> str:
    return f"{hardware()} threads={threads} peerllm={__version__}"


def _version(library: str) -> str:
    """As the engine tells it (engine/measure/compute_speed.py), found without importing the library."""
    if library == "python":
        return platform.python_version()
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
