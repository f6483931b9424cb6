"""`peerllm models`: what is here, what others need, and what the household can hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from peerllm.builtin import MODEL_DIR
from peerllm.cli.catalogue import catalogue, household, text
from peerllm.cli.main import main
from peerllm.daemon.weights.known_models import KNOWN, memory_bytes, stored_memory_bytes
from peerllm.daemon.weights.on_disk import DIRECTORIES_FILE, weights_of
from peerllm.planner.cost.byte_sizes import human_bytes
from tests.daemon.weights.gguf_files import ROWS, gguf_file
from tests.daemon.weights.gguf_files import SMALL as FREQUENCIES

SMALL = KNOWN[0]
INT8, INT4 = (memory_bytes(SMALL.millions * 10**6, bits) for bits in (8, 4))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "hub"


def entry(found: dict[str, Any], name: str) -> dict[str, Any]:
    (only,) = (one for one in [*found["on_disk"], *found["known"]] if one["name"] == name)
    return dict(only)


def test_without_a_device_it_lists_what_is_here(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = tmp_path / "my model"
    shutil.copytree(MODEL_DIR, served)
    (tmp_path / DIRECTORIES_FILE).write_text(f"{served}\n{tmp_path / 'gone'}\n")
    repository = cache / "models--maker--name"
    shutil.copytree(MODEL_DIR, repository / "snapshots" / "c0ffee")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    assert main(["models", "--data", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["on_disk"]] == ["builtin", "maker/name", str(served)]
    assert found["household"] is None and {one["fits"] for one in found["known"]} == {None}
    builtin = entry(found, "builtin")
    assert builtin["path"] == str(MODEL_DIR) and builtin["int4_bytes"] < builtin["int8_bytes"] < builtin["bytes"]
    assert main(["models", "--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "No device runs here" in out and "maker/name" in out and str(served) in out


def test_gguf_files_are_listed_with_quantisation_and_what_they_need_as_they_are(tmp_path: Path, cache: Path) -> None:
    """Those of the hub's cache, those that were served by their path, and a well-known model's data package."""
    served = gguf_file(tmp_path / "mine.Q8_0.gguf")
    (tmp_path / DIRECTORIES_FILE).write_text(f"{served}\n{tmp_path / 'gone.gguf'}\n")
    repository = cache / "models--maker--name-GGUF"
    cached = gguf_file(repository / "snapshots" / "c0ffee" / "name-Q4_K_M.gguf")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    assert SMALL.package is not None
    gguf_file(SMALL.package.path, rows=1000)
    with SMALL.package.path.open("ab") as file:
        file.truncate(SMALL.package.file_bytes)
    found = catalogue(tmp_path, {"lent_bytes": 10**9, "free_bytes": stored_memory_bytes(weights_of((served,)))})
    assert [one["name"] for one in found["on_disk"]] == ["builtin", SMALL.name, "maker/name-GGUF:Q4_K_M", str(served)]
    assert [one["form"] for one in found["on_disk"]] == ["F16", "Q4_1", "Q4_K_M", "Q8_0"]
    mine = entry({"on_disk": found["on_disk"], "known": []}, str(served))
    numbers = 2 * ROWS * 32 + FREQUENCIES
    assert mine["bytes"] == served.stat().st_size and mine["stored_bytes"] == int(1.1 * numbers * 9 / 8)
    assert (mine["fits"], mine["parameters"]) == ("stored", numbers)
    assert next(one["on_disk"] for one in found["known"] if one["name"] == SMALL.name)
    (line,) = (line for line in text(found).splitlines() if line.startswith("maker/name-GGUF:Q4_K_M "))
    assert line.split()[1:4] == ["Q4_K_M", *human_bytes(cached.stat().st_size).split()] and line.endswith("yes")


def test_well_known_gguf_models_are_counted_as_they_are_stored(tmp_path: Path) -> None:
    found = catalogue(tmp_path, {"lent_bytes": 10**12, "free_bytes": 10**12})
    one = entry(found, "qwen3-4b")
    assert (one["form"], one["hub_id"], one["fits"]) == ("Q4_K_M", "Qwen/Qwen3-4B-GGUF:Q4_K_M", "stored")
    assert 2.4e9 < one["download_bytes"] < 2.6e9 < 5e9 < one["stored_bytes"] < 6e9
    assert entry(found, "smollm2-360m")["stored_bytes"] is None and entry(found, "smollm2-360m")["form"] == "BF16"


@pytest.mark.parametrize(
    ("free", "fits", "word"),
    [
        (INT8, "int8", "yes"),
        (INT8 - 1, "int4", "with --quantize int4"),
        (INT4, "int4", "with --quantize int4"),
        (INT4 - 1, "", "no"),
    ],
)
def test_what_fits_is_said_to_the_byte(tmp_path: Path, free: int, fits: str, word: str) -> None:
    found = catalogue(tmp_path, {"lent_bytes": 2 * free, "free_bytes": free})
    assert entry(found, SMALL.name)["fits"] == fits
    (line,) = (line for line in text(found).splitlines() if line.startswith(f"{SMALL.name} "))
    assert line.endswith(word)


def test_only_devices_that_are_here_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [
        {"state": "online", "lent_bytes": 100, "promised_bytes": 30, "used_bytes": 60},
        {"state": "online", "lent_bytes": 10, "promised_bytes": 0, "used_bytes": 9},
        {"state": "offline", "lent_bytes": 1000, "promised_bytes": 0, "used_bytes": 0},
    ]

    class Here:
        def __init__(self, _: Path) -> None: ...

        def get(self, _: str) -> dict[str, Any]:
            return {"devices": devices}

    monkeypatch.setattr("peerllm.cli.catalogue.LocalDevice", Here)
    assert household(tmp_path) == {"lent_bytes": 110, "free_bytes": 80}
    devices[:] = [{"state": "starting", "lent_bytes": 0, "promised_bytes": 0, "used_bytes": 0}]
    assert household(tmp_path) is None
