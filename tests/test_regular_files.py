"""Whatever stands in a file's place is refused at once: a pipe, a socket, a device, a directory, a link to one."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peerllm import regular_files
from peerllm.api.text.model_text import ModelText
from peerllm.builtin import MODEL_DIR
from peerllm.daemon.engine_link.engine_child import diagnose
from peerllm.daemon.weights.digests import hash_range
from peerllm.daemon.weights.gguf import header
from peerllm.daemon.weights.gguf.header import read_gguf
from peerllm.daemon.weights.on_disk import weights_of
from peerllm.engine.messages import TensorAt
from peerllm.engine.weights.checkpoint import mapped, read_header, read_json, read_model, read_tensors
from peerllm.engine.weights.tensor_list import listed_tensors
from peerllm.errors import ModelError
from peerllm.regular_files import UnfitFileError, open_regular, read_regular
from tests.daemon.weights.gguf_files import gguf_file

pytestmark = pytest.mark.timeout(20)  # a reader that waits for a pipe's other end waits for ever


THINGS = ("a pipe", "a socket", "a device", "a directory", "a pipe behind a link", "a device behind a link")


@pytest.fixture(params=THINGS)
def thing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A path at which no file stands, and what does."""
    kind = str(request.param).removesuffix(" behind a link")
    path = real = tmp_path / "thing"
    opened = None
    if "link" in request.param:
        real = Path("/dev/zero") if kind == "a device" else tmp_path / "real"
        path.symlink_to(real)
    if kind == "a pipe":
        os.mkfifo(real)
    elif kind == "a socket":
        opened = socket.socket(socket.AF_UNIX)
        opened.bind(os.path.relpath(path))
    elif kind == "a device" and path == real:
        path = Path("/dev/zero")
    elif kind == "a directory":
        path.mkdir()
    yield path, kind
    if opened is not None:
        opened.close()


def test_it_is_named_and_not_opened(thing: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, kind = thing
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UnfitFileError, match=f"is {kind}, no regular file"):
        open_regular(path)


def test_one_that_takes_the_file_s_place_in_the_last_moment_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    check = regular_files._check

    def swap(path: str | Path, mode: int) -> None:
        check(path, mode)
        monkeypatch.undo()
        (tmp_path / "file").unlink()
        os.mkfifo(tmp_path / "file")

    monkeypatch.setattr(regular_files, "_check", swap)
    before = open_files()
    with pytest.raises(UnfitFileError, match="is a pipe"):
        open_regular(tmp_path / "file")
    assert open_files() == before


def test_a_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(UnfitFileError, match="larger than 4 bytes"):
        read_regular(tmp_path / "file", 4)
    with open_regular(tmp_path / "file") as file:
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


READERS: dict[str, Callable[[Path], object]] = {
    "configuration": read_json,
    "safetensors": read_header,
    "GGUF": read_gguf,
    "list of tensors": listed_tensors,
    "hash": lambda path: hash_range(path, 0, 1),
    "mapping": lambda path: mapped(TensorAt("t", "U8", (4,), str(path), 0, 4)),
    "mapping of blocks": lambda path: mapped(TensorAt("t", "Q8_0", (1, 32), str(path), 0, 34)),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_it_in_one_line(reader: str, thing: tuple[Path, str]) -> None:
    path, kind = thing
    with pytest.raises(ModelError, match=f"is {kind}") as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tensors.json"])
@pytest.mark.parametrize("pipe", [True, False])
def test_a_model_directory_with_a_pipe_or_an_endless_file_wedges_nobody(tmp_path: Path, name: str, pipe: bool) -> None:
    for file in ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json"):
        (tmp_path / file).symlink_to(MODEL_DIR / file)
    (tmp_path / name).unlink(missing_ok=True)
    if pipe:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    weights_of((tmp_path,))
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(ModelError, match=r"is a (pipe|device)"):
            read_model(tmp_path, "auto", "auto", False)
    else:  # files that need not be there are not there
        assert read_tensors(tmp_path) and read_model(tmp_path, "auto", "auto", False).name == tmp_path.name


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_s_files_too(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(MODEL_DIR / file)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "tokenizer.json":
        with pytest.raises(ModelError, match=r"no tokenizer\.json"):
            ModelText(tmp_path)
    monkeypatch.setattr(Path, "is_file", lambda self: self.exists())  # it took the file's place in the last moment
    with pytest.raises(ModelError, match=f"{name} is a pipe"):
        ModelText(tmp_path)


class Shrinking:
    """Opens a file, which is cut to `left` bytes as soon as it has told its size."""

    def __init__(self, left: int) -> None:
        self._left = left

    def __call__(self, path: Path) -> Shrinking:
        self._path, self._file = path, open_regular(path)
        return self

    def __enter__(self) -> Shrinking:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def seek(self, *place: int) -> int:
        found = self._file.seek(*place)
        if place != (0,):
            os.truncate(self._path, self._left)
        return found

    def read(self, count: int) -> bytes:
        return self._file.read(count)


@pytest.mark.parametrize("left", [0, 10, 5000])
def test_a_gguf_file_that_shrinks_while_it_is_read_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Mapped, it would end the process with SIGBUS."""
    path = gguf_file(tmp_path / "m.gguf", words=2000)
    monkeypatch.setattr(header, "FIRST_BYTES", 1000)
    whole = read_gguf(path)
    assert len(whole.metadata["tokenizer.ggml.tokens"]) == 2000, "it read on"
    monkeypatch.setattr(header, "open_regular", Shrinking(left))
    with pytest.raises(ModelError, match=r"m\.gguf (is|has)"):
        read_gguf(path)


MAPS_A_FILE_THAT_SHRINKS = """
import os, sys
from peerllm.engine.messages import TensorAt
from peerllm.engine.weights.checkpoint import mapped
os.truncate(sys.argv[1], 1 << 20)
tensor = mapped(TensorAt("t", "U8", (1 << 20,), sys.argv[1], 0, 1 << 20))
os.truncate(sys.argv[1], 0)
print(tensor[1 << 19])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="files are mapped in another way here")
def test_an_engine_whose_model_s_file_shrinks_dies_of_that_and_says_so(tmp_path: Path) -> None:
    """Its daemon goes on and starts another, which refuses a file that is too short."""
    (tmp_path / "file").write_bytes(b"")
    argv = [sys.executable, "-c", MAPS_A_FILE_THAT_SHRINKS, str(tmp_path / "file")]
    code = subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode
    assert "became shorter while it was used" in diagnose(code, [], False)
    with pytest.raises(ModelError, match="ends in the middle of tensor t"):
        mapped(TensorAt("t", "U8", (1 << 20,), str(tmp_path / "file"), 0, 1 << 20))
