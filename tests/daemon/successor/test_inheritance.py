"""What a source leaves to who follows: complete, checked before it is believed, and no way to name files of a disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import HubFiles, TensorDigest
from peerllm.daemon.decide.hub_places import HubPlaces
from peerllm.daemon.facade import RunOptions
from peerllm.daemon.successor import inheritance as module
from peerllm.daemon.successor.inheritance import (
    FILES,
    MANIFEST,
    MODEL,
    Inheritance,
    InheritedModels,
    check_files,
    leave,
)
from peerllm.daemon.weights.digests import Digests
from peerllm.daemon.weights.hub_outline import Outlines
from peerllm.errors import BadInputError, UnavailableError
from peerllm.stored_types import POOLING_FILE
from tests.daemon.house import inspected

DEPLOYMENT = "d" * 32
OPTIONS = RunOptions("/home/me/big", name="big")
HUB = HubFiles("owner/big", "c" * 40, ("sub/model.safetensors",))


def sha(name: str) -> str:
    return f"{abs(hash(name)):064x}"[-64:]


class Home:
    def __init__(self, hub: HubPlaces | None = None) -> None:
        self._hub = hub

    async def hashes(self, tensors, progress):
        return {one.name: "" if self._hub else sha(one.name) for one in tensors}

    async def hub_places(self, tensors):
        return self._hub


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha256: str) -> Path:
        return self.root / sha256


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    place = tmp_path / "big"
    place.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (place / name).write_text(f"this is {name}")
    (place / POOLING_FILE).parent.mkdir()
    (place / POOLING_FILE).write_text("this is the pooling")
    (place / "secret.txt").write_text("not for others")
    (place / "generation_config.json").write_text("")
    return place


async def left(
    tmp_path: Path, model_dir: Path, hub: HubPlaces | None = None
) -> tuple[Digests, tuple[TensorDigest, ...]]:
    digests, spent = Digests(tmp_path / "digests.json"), list[float]()
    whole = Inheritance(OPTIONS, 7, "", inspected("big", 3), {})
    files = await leave(Home(hub), digests, tmp_path / "left" / DEPLOYMENT, whole, model_dir, spent.append)
    assert len(spent) == 1 and spent[0] > 0.0, "whoever asks pays for the work"
    return digests, files


async def adopted(tmp_path: Path, model_dir: Path, hub: HubPlaces | None = None):
    digests, files = await left(tmp_path, model_dir, hub)
    fetched = {one.name: Path(digests.find(one.sha256).path) for one in check_files(files)}
    models = InheritedModels(tmp_path / "outlines" / ".inherited", Store(tmp_path / "store"))
    return models, models.adopt(DEPLOYMENT, fetched)


async def test_what_is_left_is_all_that_a_source_needs_and_nothing_of_its_disk(tmp_path, model_dir):
    models, found = await adopted(tmp_path, model_dir)
    at_hand = found.at_hand
    assert {one.relative_to(at_hand.directory).as_posix() for one in at_hand.directory.rglob("*.*")} == {
        "config.json", "tokenizer.json", "chat_template.jinja", POOLING_FILE
    }  # fmt: skip
    assert (at_hand.directory / POOLING_FILE).read_text() == "this is the pooling"
    assert (at_hand.directory / "tokenizer.json").read_text() == "this is tokenizer.json"
    assert found.inheritance.options == OPTIONS
    assert found.inheritance.created == 7
    before = inspected("big", 3)
    assert replace(at_hand.inspected, tensors=before.tensors) == before
    for layer, own in zip(at_hand.inspected.tensors, before.tensors, strict=True):
        for one, was in zip(layer, own, strict=True):
            assert one == replace(was, path=str(tmp_path / "store" / sha(was.name)), offset=0)
    assert "/nowhere" not in (tmp_path / "left" / DEPLOYMENT / MANIFEST).read_text()
    assert models.load(DEPLOYMENT) == found, "the same after a restart"


async def test_tensors_on_the_hub_are_found_there(tmp_path, model_dir):
    _, found = await adopted(tmp_path, model_dir, HubPlaces(HUB, {"/nowhere": 0}))
    paths = {one.path for layer in found.at_hand.inspected.tensors for one in layer}
    places = Outlines(tmp_path / "outlines").places(paths)
    assert places is not None
    assert places.origin == HUB
    assert {places.files[path] for path in paths} == {0}
    assert all(one.file == 0 and one.sha256 == "" for one in found.inheritance.digests())


async def test_only_layers_that_others_have_are_left_out(tmp_path, model_dir):
    _, found = await adopted(tmp_path, model_dir)
    names = [one.name for one in found.inheritance.digests(without={0, 2, 3})]
    assert names == ["big.1", "big.4"]


async def test_asked_twice_the_same_files_are_named(tmp_path, model_dir):
    assert (await left(tmp_path, model_dir))[1] == (await left(tmp_path, model_dir))[1]


@pytest.mark.parametrize("change", [
    {"hashes": {"big.1": "../../../etc/passwd"}},
    {"hashes": {}},
    {"hub": HubFiles("../..", "c" * 40, ("a.safetensors",))},
    {"hub": HUB, "hub_files": {"big.1": 5}},
])  # fmt: skip
async def test_what_makes_no_sense_is_not_adopted(tmp_path, model_dir, change):
    await left(tmp_path, model_dir)
    manifest = tmp_path / "left" / DEPLOYMENT / MANIFEST
    good = decode(manifest.read_bytes(), Inheritance)
    if change.get("hashes"):
        change = {"hashes": {**good.hashes, **change["hashes"]}}
    manifest.write_bytes(encode(replace(good, **change), Inheritance))
    models = InheritedModels(tmp_path / "outlines" / ".inherited", Store(tmp_path / "store"))
    with pytest.raises(BadInputError):
        models.adopt(DEPLOYMENT, {MANIFEST: manifest})
    with pytest.raises(UnavailableError):
        models.load(DEPLOYMENT)


async def test_layers_without_their_tensors_are_refused(tmp_path, model_dir):
    _, found = await adopted(tmp_path, model_dir)
    short = replace(found.inheritance.inspected, tensors=found.inheritance.inspected.tensors[:-1])
    with pytest.raises(BadInputError, match="other layers"):
        replace(found.inheritance, inspected=short).check()


def named(name: str, nbytes: int = 4) -> TensorDigest:
    return TensorDigest(name, "U8", (nbytes,), nbytes, "a" * 64)


@pytest.mark.parametrize("files", [
    [named("config.json")],
    [named(MANIFEST), named("../config.json")],
    [named(MANIFEST), named("config.json"), named("config.json")],
    [named(MANIFEST), named("tokenizer.json", module.MAX_FILE_BYTES + 1)],
    [named(MANIFEST), replace(named("config.json"), sha256="../x")],
    [named(MANIFEST), replace(named("config.json"), nbytes=5)],
])  # fmt: skip
def test_files_that_are_not_inherited_are_refused(files):
    with pytest.raises(BadInputError):
        check_files(files)


async def test_few_are_kept(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", 2)
    digests, files = await left(tmp_path, model_dir)
    fetched = {one.name: Path(digests.find(one.sha256).path) for one in files}
    models = InheritedModels(tmp_path / "outlines" / ".inherited", Store(tmp_path / "store"))
    for number in range(4):
        models.adopt(f"{number}" * 32, fetched)
    assert len(list((tmp_path / "outlines" / ".inherited").iterdir())) == 2
    assert (models.load("3" * 32).at_hand.directory).name == MODEL
    for number in range(4, 8):
        models.adopt(f"{number}" * 32, fetched, {"3" * 32})
    assert models.load("3" * 32) and len(list((tmp_path / "outlines" / ".inherited").iterdir())) == 3, "it is in use"
    assert MANIFEST not in FILES
