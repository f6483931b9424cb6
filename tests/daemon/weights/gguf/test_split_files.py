"""Which GGUF files make one model."""

from __future__ import annotations

from pathlib import Path

import pytest

from peerllm.daemon.weights.gguf.split_files import gguf_files, one_of_each
from peerllm.errors import ModelError

PARTS = [f"M-Q4_K_M-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


def held(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).write_bytes(b"")
    return directory


def test_a_file_is_a_model(tmp_path: Path) -> None:
    held(tmp_path, "a.gguf", "b.gguf")
    assert gguf_files(tmp_path / "b.gguf") == [tmp_path / "b.gguf"]


@pytest.mark.parametrize("named", PARTS)
def test_any_part_finds_all(named: str, tmp_path: Path) -> None:
    held(tmp_path, *PARTS, "other-00001-of-00002.gguf")
    assert gguf_files(tmp_path / named) == [tmp_path / name for name in PARTS]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    held(tmp_path, PARTS[1])
    with pytest.raises(ModelError, match=f"lacks parts of this model: {PARTS[0]}, {PARTS[2]}$"):
        gguf_files(tmp_path / PARTS[1])
    with pytest.raises(ModelError, match=f"lacks parts of this model: {PARTS[0]}, {PARTS[2]}$"):
        gguf_files(tmp_path / PARTS[0])  # which is not there itself


def test_of_many_missing_parts_some_are_named(tmp_path: Path) -> None:
    held(tmp_path, "m-00001-of-00500.gguf")
    with pytest.raises(ModelError, match=r"m-00013-of-00500\.gguf and 487 more$"):
        gguf_files(tmp_path / "m-00001-of-00500.gguf")


@pytest.mark.parametrize("name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-00001-of-99999.gguf"])
def test_a_name_that_cannot_be_is_said_to_be_so(name: str, tmp_path: Path) -> None:
    held(tmp_path, name)
    with pytest.raises(ModelError, match="which cannot be"):
        gguf_files(tmp_path / name)


def test_a_directory_with_one_model_is_that_model(tmp_path: Path) -> None:
    held(tmp_path, *PARTS, "mmproj-F16.gguf", "README.md")
    assert gguf_files(tmp_path) == [tmp_path / name for name in PARTS]


def test_of_several_models_one_must_be_named(tmp_path: Path) -> None:
    held(tmp_path, *PARTS, "M-Q8_0.gguf", "mmproj-F16.gguf")
    with pytest.raises(ModelError, match=rf"several models: {PARTS[0]}, M-Q8_0\.gguf; name the file that is meant"):
        gguf_files(tmp_path)


@pytest.mark.parametrize("name", ["gone.gguf", ""])
def test_what_holds_no_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no file|holds no \.gguf"):
        gguf_files(tmp_path / name)


def test_each_model_is_listed_once() -> None:
    names = [
        *reversed(PARTS),
        "b.GGUF",
        "a.gguf",
        "sub/a.gguf",
        "mmproj.gguf",
        "imatrix.gguf",
        "config.json",
        "M-00001-of-00002.gguf",
        f"{PARTS[0][:-6]}4.gguf",
    ]
    assert one_of_each(names) == [
        "M-00001-of-00002.gguf",
        PARTS[0],
        f"{PARTS[0][:-6]}4.gguf",
        "a.gguf",
        "b.GGUF",
        "sub/a.gguf",
    ]
