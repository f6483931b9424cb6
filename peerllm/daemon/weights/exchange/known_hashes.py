"""The SHA-256 of tensors by their place on the hub, as the first device that fetched them found it; a line each."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from peerllm.daemon.decide.hub_places import SHA256
from peerllm.saved_files import replace_file

MAX_KNOWN = 1 << 17  # tensors; the longest known are forgotten first
LINE_BYTES = 2 * 64 + 2

log = logging.getLogger(__name__)


class KnownHashes:
    """Read when first asked; each new one is appended to the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._known: dict[str, str] | None = None

    def get(self, key: str) -> str:
        """Empty for a tensor that nobody has hashed yet."""
        with self._lock:
            return self._read().get(key, "")

    def add(self, key: str, sha256: str) -> None:
        """Remember it; where the disk is full, only until this process ends."""
        with self._lock:
            known = self._read()
            known.pop(key, None)
            known[key] = sha256
            try:
                if len(known) > MAX_KNOWN:
                    for old in list(known)[: len(known) - MAX_KNOWN // 2]:
                        del known[old]
                    replace_file(self._file, "".join(f"{k} {s}\n" for k, s in known.items()).encode())
                else:
                    with self._file.open("ab") as file:
                        file.write(f"\n{key} {sha256}".encode())  # a line that a full disk cut short before has ended
            except OSError as error:
                log.warning("the hash of a tensor cannot be kept for the next start: %s", error.strerror)

    def _read(self) -> dict[str, str]:
        if self._known is None:
            self._known = {}
            try:
                with self._file.open("rb") as file:
                    lines = file.read(2 * MAX_KNOWN * LINE_BYTES).decode("ascii", "replace").splitlines()
            except OSError:
                lines = []
            for line in lines:  # one that was cut short by a full disk or a crash is none
                key, _, sha256 = line.partition(" ")
                if SHA256.fullmatch(key) and SHA256.fullmatch(sha256):
                    self._known[key] = sha256
        return self._known
