"""GGUF repositories on the hub: which files are meant, plans from headers, downloads, the cache without a hub."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.daemon.deployment import model_files
from peerllm.daemon.deployment.model_files import looked_up, resolve
from peerllm.daemon.weights import hub_header
from peerllm.daemon.weights.gguf.header import read_gguf
from peerllm.daemon.weights.hub_header import header_ends
from peerllm.daemon.weights.hub_outline import Outlines
from peerllm.daemon.weights.on_disk import in_hub_cache, weights_of
from peerllm.errors import ModelError, NotFoundError, UnavailableError
from tests.daemon.weights.gguf_files import ROWS, SMALL, gguf_file
from tests.daemon.weights.hub_server import HubServer, hub_server

MODEL = "maker/small-GGUF"
Q4, Q8 = "small-Q4_K_M.gguf", "small-Q8_0.gguf"
PARTS = ("BF16/small-BF16-00001-of-00002.gguf", "BF16/small-BF16-00002-of-00002.gguf")
WIDE = 20_000  # rows: the weights are much larger than what the header needs


def quiet(share: float) -> None:
    pass


class Made:
    """What became of GGUF files: which they were, and what their headers said."""

    def __init__(self) -> None:
        self.files: list[list[str]] = []
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.blocks = 0  # bytes that the files take on the disk

    def __call__(self, files: Sequence[Path], cache_root: Path) -> Path:
        self.files.append([file.name for file in files])
        self.blocks = sum(file.stat().st_blocks * 512 for file in files)
        for file in files:
            self.tensors |= {name: tuple(one.shape) for name, one in read_gguf(file).tensors.items()}
        place = cache_root / files[0].stem
        place.mkdir(parents=True, exist_ok=True)
        return place


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    one = Made()
    monkeypatch.setattr(model_files, "model_directory", one)
    return one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the hub's repository: two quantisations, a third in two parts, an image projector."""
    folder = tmp_path / "hub" / MODEL
    gguf_file(folder / Q4, rows=WIDE)
    gguf_file(folder / Q8)
    for number, part in enumerate(PARTS):
        gguf_file(folder / part, words=100 + number)
    gguf_file(folder / "mmproj-small-f16.gguf")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server(tmp_path / "hub", tmp_path / "cache", monkeypatch) as server:
        yield server


async def test_a_plan_needs_the_header_alone(
    hub: HubServer, made: Made, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_header, "FIRST_BYTES", 1000)  # doubled until the header ends
    said: list[str] = []
    async with looked_up(MODEL, tmp_path / "kept", lambda text, share: said.append(text)) as found:
        assert found.missing_bytes == 0 and found.form == "Q4_K_M", "nothing is downloaded as a whole"
        assert made.files == [[Q4]] and made.tensors["output.weight"] == (WIDE, 32)
        assert made.blocks < 100_000, "the outline takes room on the disk"
    outlined = tmp_path / "outlines"
    assert outlined in found.directory.parents and not (tmp_path / "kept").exists()
    (outline,) = outlined.rglob(Q4)
    assert read_gguf(outline).tensors == {
        name: replace(one, path=str(outline)) for name, one in read_gguf(folder / Q4).tensors.items()
    }, "each tensor lies where it lies on the hub"
    original, outlined_bytes = (folder / Q4).read_bytes(), outline.read_bytes()
    small = read_gguf(outline).tensors["rope_freqs.weight"]
    assert outlined_bytes[small.offset :][: small.nbytes] == original[small.offset :][: small.nbytes] != bytes(64)
    large = read_gguf(outline).tensors["token_embd.weight"]
    assert not any(outlined_bytes[large.offset + 40_000 :][:1000])
    assert set(hub.bodies) == {Q4} and 0 < hub.bodies[Q4] < 40_000 < (folder / Q4).stat().st_size
    places = Outlines(outlined).places([str(outline)])
    assert places is not None and places.origin.files == (Q4,) and places.files == {str(outline): 0}
    hub.close()
    async with looked_up(f"{MODEL}:q4_k_m", tmp_path / "kept", lambda text, share: None) as offline:
        assert offline.directory.name == found.directory.name
    with pytest.raises(UnavailableError, match=f"^{MODEL}:Q2_K is not on this disk"):
        async with looked_up(f"{MODEL}:Q2_K", tmp_path / "kept", lambda text, share: None):
            pass
    assert said == [f"taking Q4_K_M of {MODEL}, which also has Q8_0, BF16"]


async def test_a_hub_that_gives_no_parts_is_not_read_twice(
    hub: HubServer, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_header, "FIRST_BYTES", 1000)
    hub.parts = False
    with pytest.raises(ModelError, match="gives no parts"):
        hub_header.weight_header(MODEL, Q4, "main", None, 10.0)


@pytest.mark.parametrize(
    ("tag", "files"), [("", [Q4]), (":q8_0", [Q8]), (f":{Q8}", [Q8]), (":bf16", [part[5:] for part in PARTS])]
)
async def test_only_what_is_meant_is_downloaded_and_is_there_without_the_hub(
    hub: HubServer, made: Made, tmp_path: Path, tag: str, files: list[str]
) -> None:
    shares: list[float] = []
    directory = await resolve(MODEL + tag, tmp_path / "kept", shares.append)
    await asyncio.sleep(0)
    assert directory.parent == tmp_path / "kept"
    assert made.files == [files] and set(hub.bodies) == set(files)
    assert shares and shares == sorted(set(shares)) and shares[-1] == pytest.approx(1, abs=0.02)
    sent = sum(hub.bodies.values())
    async with looked_up(MODEL + tag, tmp_path / "kept", lambda text, share: None) as again:
        assert (again.directory, again.missing_bytes) == (directory, 0) and again.form in ("Q4_K_M", "Q8_0", "BF16")
    assert await resolve(MODEL + tag, tmp_path / "kept", quiet) == directory
    assert made.files == [files] * 3 and sum(hub.bodies.values()) == sent
    hub.close()
    async with looked_up(MODEL + tag, tmp_path / "kept", lambda text, share: None) as offline:
        assert (offline.directory, offline.missing_bytes) == (directory, 0)
    assert await resolve(MODEL + tag, tmp_path / "kept", quiet) == directory
    with pytest.raises(UnavailableError, match=f"^{MODEL}:Q2_K is not on this disk, and the .* hub cannot be reached"):
        await resolve(f"{MODEL}:Q2_K", tmp_path / "kept", quiet)
    with pytest.raises(UnavailableError, match="; did you mean smollm2"):
        await resolve("smolm2", tmp_path / "kept", quiet)


async def test_a_quantisation_that_is_not_there_lists_those_that_are(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        async with looked_up(f"{MODEL}:Q2_K", tmp_path, lambda text, share: None):
            pass
    assert str(caught.value).startswith(f"{MODEL} has no Q2_K; there are Q4_K_M (") and "\n" not in str(caught.value)


async def test_of_both_forms_safetensors_are_taken_unless_a_quantisation_is_named(
    hub: HubServer, folder: Path, made: Made, tmp_path: Path
) -> None:
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copyfile(MODEL_DIR / file, folder / file)
    plain = await resolve(MODEL, tmp_path / "kept", quiet)
    assert (plain / "model.safetensors").is_file() and made.files == []
    await resolve(f"{MODEL}:Q8_0", tmp_path / "kept", quiet)
    assert made.files == [[Q8]]
    assert list(in_hub_cache()) == [MODEL, f"{MODEL}:Q8_0"]
    assert await resolve(MODEL, tmp_path / "kept", quiet) == plain
    hub.close()
    assert await resolve(MODEL, tmp_path / "kept", quiet) == plain
    await resolve(f"{MODEL}:Q8_0", tmp_path / "kept", quiet)
    assert made.files == [[Q8]] * 2


async def test_a_hub_that_hangs_does_not_keep_what_is_here(
    hub: HubServer, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = await resolve(f"{MODEL}:Q8_0", tmp_path / "kept", quiet)
    monkeypatch.setattr(model_files, "PATIENCE_S", 0.05)
    monkeypatch.setattr(model_files.hub, "ASK_TIMEOUT_S", 1000.0)
    never = threading.Event()
    monkeypatch.setattr(model_files.hub, "ask", lambda *_: never.wait(60))
    async with asyncio.timeout(20):
        assert await resolve(f"{MODEL}:Q8_0", tmp_path / "kept", quiet) == directory
    never.set()


async def test_where_there_is_no_choice_none_is_told(hub: HubServer, folder: Path, made: Made, tmp_path: Path) -> None:
    for file in (Q8, *PARTS):
        (folder / file).unlink()
    said: list[str] = []
    async with looked_up(MODEL, tmp_path / "kept", lambda text, share: said.append(text)):
        assert made.files == [[Q4]] and said == []


async def test_other_programs_names_for_the_hub_are_understood(hub: HubServer, made: Made, tmp_path: Path) -> None:
    await resolve(f"hf.co/{MODEL}:Q8_0", tmp_path, quiet)
    assert made.files == [[Q8]]


async def test_a_repository_with_neither_form_says_so(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "hub" / "maker" / "empty").mkdir()
    (tmp_path / "hub" / "maker" / "empty" / "pytorch_model.bin").write_text("x")
    with pytest.raises(NotFoundError, match="neither safetensors nor GGUF"):
        await resolve("maker/empty", tmp_path, quiet)


async def test_a_file_that_is_no_gguf_is_left_to_the_reader(
    hub: HubServer, folder: Path, made: Made, tmp_path: Path
) -> None:
    (folder / Q4).write_bytes(b"no such thing" * 10)
    with pytest.raises(ModelError, match="GGUF"):
        async with looked_up(MODEL, tmp_path / "kept", lambda text, share: None):
            pass


def test_a_header_ends_where_the_tensors_are_told(tmp_path: Path) -> None:
    data = gguf_file(tmp_path / "x.gguf", words=20).read_bytes()
    whole = next(size for size in range(len(data)) if header_ends(data[:size]))
    assert all(not header_ends(data[:size]) for size in range(whole))
    assert len(data) - whole - 2 * ROWS * 32 * 4 - SMALL * 4 < 64, "only alignment is between header and weights"
    with pytest.raises(ModelError):
        header_ends(b"GGML" + data[4:])
    with pytest.raises(ModelError, match="unknown type 99"):
        header_ends(data[:24] + (1).to_bytes(8, "little") + b"k" + (99).to_bytes(4, "little") + data[40:])
    endless = data[:8] + b"\xff" * 16 + b"\0" * 5000
    assert not header_ends(endless), "a count that lies ends with the bytes"


def test_what_gguf_files_hold_is_told_by_their_headers(tmp_path: Path) -> None:
    held = weights_of((gguf_file(tmp_path / "a-Q4_0.gguf"), gguf_file(tmp_path / "b.gguf")))
    size = sum(file.stat().st_size for file in tmp_path.glob("*.gguf"))
    assert (held.nbytes, held.numbers, held.form) == (size, 2 * (2 * ROWS * 32 + SMALL), "Q4_0")
    assert weights_of((tmp_path / "b.gguf",)).form == "F32"
    (tmp_path / "c.gguf").write_bytes(b"GGUF" * 9)
    assert weights_of((tmp_path / "c.gguf",)).numbers == 0
