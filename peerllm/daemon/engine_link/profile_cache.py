"""Layer times on disk, so that a device measures a model once per hardware, library versions, threads and dtype."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from peerllm.codec import decode, encode
from peerllm.errors import LinkError
from peerllm.saved_files import replace_file
from peerllm.types import LayerKind

MAX_ENTRIES = 512  # kinds of layers, the newest
MAX_FILE_BYTES = 4 << 20
TIMED_BY = "2"  # another number where layers are timed in another way: older times do not hold

Points = tuple[tuple[int, float], ...]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    points: Points


@dataclass(frozen=True, slots=True)
class _Entries:
    entries: tuple[_Entry, ...]


def layer_key(computed_by: str, config: str, kind: LayerKind, dtype: str, quantisation: str = "") -> str:
    """What layer times hold for: who computes (hardware, threads, versions), which layer, how, and how it was timed."""
    parts = (computed_by, config, kind, dtype, quantisation, TIMED_BY)
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class ProfileFile:
    """Blocking; for one caller at a time. What cannot be read counts as not measured."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Points] | None = None

    def get(self, keys: dict[LayerKind, str]) -> dict[LayerKind, Points]:
        """The times that are known, by kind."""
        known = self._read()
        return {kind: known[key] for kind, key in keys.items() if key in known}

    def put(self, found: dict[str, Points]) -> None:
        """Keep times by key; beyond MAX_ENTRIES the oldest are dropped."""
        known = {key: points for key, points in self._read().items() if key not in found} | found
        self._entries = dict(list(known.items())[-MAX_ENTRIES:])
        try:
            entries = tuple(_Entry(key, points) for key, points in self._entries.items())
            replace_file(self._path, encode(_Entries(entries), _Entries))
        except OSError as error:
            log.warning("layer times cannot be kept for the next start: %s", error)

    def _read(self) -> dict[str, Points]:
        if self._entries is None:
            try:
                data = self._path.read_bytes() if self._path.stat().st_size <= MAX_FILE_BYTES else b""
                self._entries = {entry.key: entry.points for entry in decode(data, _Entries).entries}
            except (OSError, LinkError):
                self._entries = {}  # none yet, damaged, or of another version: measured again
        return self._entries
