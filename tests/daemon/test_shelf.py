"""Models on a disk: fetched, called by other names, deleted, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peerllm.daemon.deployment.model_files import ModelOnDisk
from peerllm.daemon.facade import IDLE_MODEL
from peerllm.daemon.shelf.disk_models import DiskModels
from peerllm.daemon.shelf.model_shelf import FILE, MAX_ALIASES, MAX_PULLS, ModelShelf, meant
from peerllm.daemon.status.household_models import startable_models
from peerllm.daemon.weights.on_disk import DIRECTORIES_FILE, note_directories
from peerllm.errors import BadInputError, NotFoundError, OverloadedError, UnavailableError
from tests.daemon.weights.gguf.gguf_bytes import I32, STRING, entry, header, info, padded

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Hub:
    """Puts a model into the hub's cache, as the hub's own client lays it out."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.fetched = cache, list[str]()
        self.gate, self.begun = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    @asynccontextmanager
    async def looked_up(self, model, tell):
        if self.error:
            raise self.error
        yield ModelOnDisk(self.cache, 4000)

    async def resolve(self, model, progress, total_bytes):
        self.begun.set()
        progress(0.5)
        await self.gate.wait()
        self.fetched.append(model)
        return put(self.cache, SMOL if model == "smollm2" else model)


def put(cache: Path, model: str) -> Path:
    repository = cache / f"models--{model.replace('/', '--')}"
    place = repository / "snapshots" / "c0ffee"
    place.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    for name in ("config.json", "model.safetensors"):
        (repository / "blobs" / name[:5]).write_bytes(b"{}" * 10)
        (place / name).symlink_to(repository / "blobs" / name[:5])
    return place


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Hub(tmp_path / "hub")


@pytest.fixture
async def shelf(hub, tmp_path):
    one = ModelShelf(tmp_path / "data", hub, set, lambda: None)
    yield one
    await one.close()


def listed(shelf):
    return {one.name for one in shelf.listed if not one.alias}


@pytest.mark.parametrize(
    ("name", "model"),
    [("smollm2", "smollm2"), ("SmolLM2:latest", "smollm2"), (SMOL, "smollm2"), ("qwen3:0.6b", "qwen3-0.6b"),
     ("owner/name", "owner/name"), (f"hf.co/{SMOL}", "smollm2")],
)  # fmt: skip
def test_what_a_name_means(name, model):
    assert meant(name) == model


async def test_a_model_is_fetched_once_and_can_be_deleted(hub, shelf, tmp_path):
    told = []
    hub.gate.clear()
    both = [asyncio.ensure_future(shelf.pull(name, lambda *far: told.append(far))) for name in ("smollm2:latest", SMOL)]
    await hub.begun.wait()
    hub.gate.set()
    await asyncio.gather(*both)
    assert hub.fetched == ["smollm2"] and told == [(0, 4000), (2000, 4000)]
    assert listed(shelf) == {"builtin", "smollm2"}
    assert [one.abilities for one in shelf.listed] == [("tools",), ()], "the second has no file but its weights"
    again = ModelShelf(tmp_path / "data", hub, {"smollm2"}.copy, lambda: None)
    with pytest.raises(BadInputError, match=r"smollm2 runs; .*stop"):
        await again.delete("smollm2")
    await again.close()
    again = ModelShelf(tmp_path / "data", hub, set, lambda: None)
    await again.delete("SmolLM2-135M-Instruct")
    assert listed(again) == {"builtin"}
    assert not [one for one in hub.cache.rglob("*") if one.name.startswith("model") and "models--" not in one.name]
    with pytest.raises(NotFoundError):
        await again.delete("smollm2")
    await again.close()


async def test_what_is_not_deleted(hub, shelf, tmp_path):
    place = put(hub.cache, "owner/other")
    own = tmp_path / "mine"
    own.mkdir()
    (own / "config.json").write_text("{}")
    (own / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "directories.txt").write_text(f"{own}\n")
    for name, why in (("builtin", "part of peerllm"), ("owner/other", "yours to delete"), ("mine", "yours to delete")):
        with pytest.raises(BadInputError, match=why):
            await shelf.delete(name)
    assert (place / "model.safetensors").exists() and (own / "model.safetensors").exists()


async def test_a_model_is_listed_by_the_name_that_it_has_when_it_runs(hub, shelf):
    for model in ("owner/one", "owner/two", "other/One"):
        put(hub.cache, model)
    await shelf.disk.refresh()
    assert listed(shelf) - {"builtin", "smollm2"} in ({"one", "two", "other/One"}, {"One", "two", "owner/one"})


@pytest.mark.parametrize("name", ["/etc", "~/x", "../x", "a b", "no/such/thing/at/all", "", "."])
async def test_what_is_no_model_is_not_fetched(hub, shelf, name):
    with pytest.raises(NotFoundError):
        await shelf.pull(name, lambda *_: None)
    assert not hub.fetched and not shelf._turns


async def test_fetches_are_bounded_end_with_who_asked_and_fail_in_words(hub, shelf):
    hub.gate.clear()
    under_way = [asyncio.ensure_future(shelf.pull(f"owner/m{n}", lambda *_: None)) for n in range(MAX_PULLS)]
    await hub.begun.wait()
    with pytest.raises(OverloadedError, match="are being fetched"):
        await shelf.pull("owner/more", lambda *_: None)
    for one in under_way:
        one.cancel()
    await asyncio.gather(*under_way, return_exceptions=True)
    assert not shelf._turns
    hub.error = UnavailableError("the hub does not answer")
    with pytest.raises(UnavailableError):
        await shelf.pull("owner/more", lambda *_: None)
    assert not shelf._turns


async def test_other_names(hub, shelf, tmp_path):
    await shelf.disk.refresh()
    await shelf.alias("gpt-4:latest", "builtin")
    again = ModelShelf(tmp_path / "data", hub, set, lambda: None)
    await again.disk.refresh()
    models = startable_models([], [("", again.listed)])
    assert [(one.name, one.model, one.state) for one in models] == [
        ("builtin", "builtin", IDLE_MODEL), ("gpt-4", "builtin", IDLE_MODEL),
    ]  # fmt: skip
    assert [one.alias for one in models] == [False, True]
    for name, why in (("a/b", "no name"), ("", "no name"), ("Builtin", "already"), ("x" * 65, "no name")):
        with pytest.raises(BadInputError, match=why):
            await again.alias(name, "builtin")
    await again.delete("gpt-4")
    assert not any(one.alias for one in again.listed)
    for number in range(MAX_ALIASES):
        await again.alias(f"n{number}", "builtin")
    with pytest.raises(BadInputError, match="delete one"):
        await again.alias("more", "builtin")
    await again.close()


@pytest.mark.parametrize("said", ["{", "[]", '{"aliases": 3, "pulled": []}', "null", json.dumps({"aliases": {}})])
def test_a_damaged_file_is_an_empty_one(hub, tmp_path, said):
    (tmp_path / FILE).write_text(said)
    assert not ModelShelf(tmp_path, hub, set, lambda: None)._aliases


async def test_what_is_here_already_is_not_fetched(hub, shelf):
    put(hub.cache, "owner/other")
    told = []
    await shelf.pull("owner/other:latest", lambda *far: told.append(far))
    assert not hub.fetched and not told


async def test_a_gguf_file_says_what_its_model_can_do(hub, tmp_path):
    named = {"thinks": [entry("tokenizer.chat_template", STRING, "<think></think>")],
             "speaks": [entry("tokenizer.chat_template", I32, 3)], "broken": []}  # fmt: skip
    for name, entries in named.items():
        raw = padded(header(entries, [info("output.weight", [64, 8], 0, 0)])) + bytes(2048)
        (tmp_path / f"{name}.gguf").write_bytes(raw if entries else raw[:40])
    (tmp_path / "data").mkdir()
    note_directories(tmp_path / "data" / DIRECTORIES_FILE, [str(tmp_path / f"{name}.gguf") for name in named])
    disk = DiskModels(tmp_path / "data", lambda: None)
    await disk.refresh()
    can = {one.name: one.abilities for one in disk.listed}
    assert (can["thinks"], can["speaks"], can["broken"]) == (("tools", "thinking"), (), ())
    await disk.close()


async def test_files_of_no_time_that_could_be_told(hub, shelf):
    """Some disks and archives have such times; others would refuse all that this device says."""
    os.utime(put(hub.cache, "owner/old") / "model.safetensors", (0, -5))
    await shelf.disk.refresh()
    assert {one.name: one.made for one in shelf.disk.listed}["old"] == 0
