"""A model on the hub: what it holds is known without its weights; the download; what is already on this disk."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from peerllm.builtin import MODEL_DIR
from peerllm.daemon.deployment.model_files import looked_up, resolve
from peerllm.daemon.weights import hub_outline
from peerllm.daemon.weights.hub import ask
from peerllm.daemon.weights.hub_download import download, hub_bar
from peerllm.daemon.weights.hub_outline import Outlines
from peerllm.engine.weights.checkpoint import read_tensors
from peerllm.errors import ModelError, NotFoundError, UnavailableError
from peerllm.stored_types import POOLING_FILE
from tests.daemon.weights.hub_server import HubServer, hole, hub_server

MODEL = "maker/small"
WEIGHTS = "model.safetensors"
SIZE = (MODEL_DIR / WEIGHTS).stat().st_size
POOLING = '{"pooling_mode_lasttoken": true}'
MOST_HEADER = 300_000  # bytes that may be fetched of a weight file before there is a plan


def quiet(share: float) -> None:
    pass


def untold(message: str, share: float | None = None) -> None:
    pass


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A place for what GGUF files become; outlines lie beside it."""
    return tmp_path / "data" / "gguf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """It holds the built-in model as MODEL; the cache is empty."""
    shutil.copytree(MODEL_DIR, tmp_path / "hub" / MODEL, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "hub" / MODEL / "onnx").mkdir()
    (tmp_path / "hub" / MODEL / "onnx" / "other.json").write_text("{}")
    (tmp_path / "hub" / MODEL / POOLING_FILE).parent.mkdir()
    (tmp_path / "hub" / MODEL / POOLING_FILE).write_text(POOLING)
    (tmp_path / "hub" / MODEL / "modeling.py").write_text("raise SystemExit")
    with hub_server(tmp_path / "hub", tmp_path / "cache", monkeypatch) as server:
        yield server


def shapes(directory: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    return {name: (one.dtype, tuple(one.shape), one.nbytes) for name, one in read_tensors(directory).items()}


async def test_an_outline_tells_all_but_the_weights_and_stays(hub: HubServer, kept: Path) -> None:
    async with looked_up(MODEL, kept, untold) as found:
        assert found.missing_bytes == 0 and found.directory.name == "small", "nothing is downloaded as a whole"
    outlined, whole = read_tensors(found.directory), read_tensors(MODEL_DIR)
    assert {name: replace(one, path="") for name, one in outlined.items()} == {
        name: replace(one, path="") for name, one in whole.items()
    }, "each tensor lies where it lies on the hub"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (found.directory / name).read_bytes() == (MODEL_DIR / name).read_bytes()
    assert (found.directory / POOLING_FILE).read_text() == POOLING
    weights = found.directory / WEIGHTS
    assert weights.stat().st_blocks * 512 < SIZE / 4, "the outline takes room on the disk"
    assert weights.stat().st_size == SIZE
    assert 0 < hub.bodies[WEIGHTS] <= MOST_HEADER < SIZE
    assert not hub.asked.is_set()
    assert not (found.directory / "modeling.py").exists() and not (found.directory / "onnx").exists()
    sent = dict(hub.bodies)
    async with looked_up(MODEL, kept, untold) as again:
        assert again == found
    assert hub.bodies == sent, "what is outlined is not fetched again"
    hub.close()  # the network is gone, the outline is not
    async with looked_up(MODEL, kept, untold) as offline:
        assert offline == found


async def test_what_the_owner_alone_may_have_is_downloaded_as_a_whole_by_its_source(hub: HubServer, kept: Path) -> None:
    hub.gated = True
    async with looked_up(MODEL, kept, untold) as found:
        missing = found.missing_bytes
    assert SIZE <= missing < 1.1 * SIZE
    shares: list[float] = []
    directory = await resolve(MODEL, kept, shares.append, missing)
    await asyncio.sleep(0)
    assert (directory / WEIGHTS).read_bytes() == (MODEL_DIR / WEIGHTS).read_bytes()
    assert shares == sorted(set(shares)) and 0.9 < shares[-1] <= 1
    assert not (directory / "modeling.py").exists() and not (directory / "onnx").exists()
    async with looked_up(MODEL, kept, untold) as again:
        assert (again.directory, again.missing_bytes) == (directory, 0)
    hub.close()  # the network is gone, the model is not
    async with looked_up(MODEL, kept, untold) as offline:
        assert (offline.directory, offline.missing_bytes) == (directory, 0)
    assert await resolve(MODEL, kept, quiet) == directory


async def test_of_many_outlines_the_longest_unused_goes(
    hub: HubServer, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_outline, "MOST_KEPT", 2)
    for name in "abc":
        shutil.copytree(tmp_path / "hub" / MODEL, tmp_path / "hub" / "maker" / name)
    outlines = Outlines(kept.parent / "outlines")
    for when, name in enumerate("abac", 1):
        async with looked_up(f"maker/{name}", kept, untold) as found:
            if name != "c":
                os.utime(found.directory.parent, (when, when))
    assert [bool(outlines.kept(f"maker/{name}", "")) for name in "abc"] == [True, False, True]


def test_what_is_half_here_is_not_taken_for_all(hub: HubServer) -> None:
    found = ask(MODEL)
    assert found.paths == ()
    assert found.missing_bytes == sum(found.sizes.values())
    for name in found.sizes:
        if name != WEIGHTS:
            hf_hub_download(MODEL, name, revision=found.commit)
    assert found.paths == () and found.missing_bytes == SIZE
    hf_hub_download(MODEL, WEIGHTS, revision=found.commit)
    assert len(found.paths) == 1 and found.missing_bytes == 0


def test_only_bars_of_bytes_tell_how_far_a_download_is_of_all_that_is_missing() -> None:
    shares: list[float] = []
    bar = hub_bar(shares.append, 1000, threading.Event())
    bar(total=600, unit="it").update(500)  # files
    assert shares == []
    bytes_here = bar(total=100, unit="B", name="huggingface_hub.snapshot_download")
    for _ in range(4):
        bytes_here.update(25)
    bytes_here.update(2)
    assert shares == [0.025, 0.05, 0.075, 0.1], "each percent once, of all files"


async def test_only_weights_that_the_index_names_are_looked_at(hub: HubServer, kept: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / MODEL
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    shutil.copyfile(folder / "model-00001-of-00001.safetensors", folder / "consolidated.safetensors")
    names = dict.fromkeys(shapes(MODEL_DIR), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    async with looked_up(MODEL, kept, untold) as found:
        assert [one.name for one in found.directory.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
        assert shapes(found.directory) == shapes(MODEL_DIR)


def parts_of_a_wrapper(folder: Path, model_type: str) -> None:
    """Three weight files: one of the language model, one of the vision model, one that no index names."""
    for file in folder.glob("*"):
        if file.is_file():
            file.unlink()
    weights = {"a": "language_model.model.norm.weight", "b": "vision_tower.norm.weight", "c": "consolidated.weight"}
    for name, tensor in weights.items():
        hole(folder / f"{name}.safetensors", {tensor: {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}})
    index = {weights[name]: f"{name}.safetensors" for name in "ab"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "text_config": {}}))


@pytest.mark.parametrize(("model_type", "fetched"), [("mistral3", {"a"}), ("unwrapped", {"a", "b"})])
async def test_files_of_the_vision_model_alone_are_neither_counted_nor_downloaded(
    hub: HubServer, tmp_path: Path, model_type: str, fetched: set[str]
) -> None:
    folder = tmp_path / "hub" / MODEL
    parts_of_a_wrapper(folder, model_type)
    found = ask(MODEL)
    weights = {f"{name}.safetensors" for name in fetched}
    assert {name for name in found.sizes if name.endswith(".safetensors")} == weights
    assert found.missing_bytes == sum(
        (folder / name).stat().st_size for name in {*weights, POOLING_FILE}
    )  # the rest is here
    (directory,) = download(found, quiet, 0, threading.Event())
    assert {one.name for one in directory.glob("*.safetensors")} == weights
    assert ask(MODEL).paths == (directory,)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}'])
async def test_an_index_that_is_none_does_not_hide_the_reason(
    hub: HubServer, kept: Path, tmp_path: Path, index: str
) -> None:
    """What the outline cannot use is downloaded, and said where a model is read."""
    (tmp_path / "hub" / MODEL / "model.safetensors.index.json").write_text(index)
    async with looked_up(MODEL, kept, untold) as found:
        assert found.missing_bytes == 0
        with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
            read_tensors(found.directory)


async def test_a_damaged_header_is_left_to_the_reader(hub: HubServer, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "hub" / MODEL / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    async with looked_up(MODEL, kept, untold) as found:
        with pytest.raises(ModelError):
            read_tensors(found.directory)


async def test_gated_and_unknown_models_are_one_clear_line(hub: HubServer, kept: Path) -> None:
    with pytest.raises(NotFoundError, match="no such model on the Hugging Face hub"):
        async with looked_up("maker/none", kept, untold):
            pass
    hub.refuse[f"/{MODEL}/resolve"] = 403, "GatedRepo"
    with pytest.raises(ModelError, match=r"gated.*HF_TOKEN") as caught:
        async with looked_up(MODEL, kept, untold):
            pass
    assert "\n" not in str(caught.value)


def test_a_download_that_nobody_waits_for_ends(hub: HubServer) -> None:
    halt = threading.Event()
    halt.set()
    with pytest.raises(UnavailableError, match="was stopped"):
        download(ask(MODEL), quiet, 0, halt)
