"""Bytes that change on a disk: found before they are used, named, and replaced or refused; never computed with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from peerllm.daemon.control_messages import Assign, StageWork
from peerllm.daemon.weights import digests as digests_module
from peerllm.daemon.weights import weight_store as store_module
from peerllm.daemon.weights.digests import Digests, hash_range
from peerllm.daemon.weights.exchange import tensor_fetch
from peerllm.daemon.weights.stage_weights import StageWeights
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.errors import ModelError
from tests.daemon.weights.weight_house import DEPLOYMENT, Peers, WeightHouse, checkpoint, held, quiet

SIZES = (0, 4, 50_000, 200_000)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(tensor_fetch, "LEAST_LOOK_S", 0.001)


@pytest.fixture
def tensors(tmp_path):
    return checkpoint(tmp_path / "model.safetensors", SIZES)


@pytest.fixture
async def house(tmp_path):
    async with WeightHouse(tmp_path, "ab") as made:
        yield made


def spoil(path: Path, offset: int = 0, count: int = 64, silently: bool = False) -> None:
    """Change bytes; `silently`: the file's time stays as it was, as when the disk loses them."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = bytes(255 - byte for byte in data[offset : offset + count])
    path.write_bytes(data)
    if silently:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def gone(path: str) -> None:
    Path(path).unlink()


class Hashing:
    """Which files are hashed."""

    def __init__(self, monkeypatch):
        self.seen: list[str] = []
        for module in (digests_module, store_module):
            monkeypatch.setattr(module, "hash_range", self)

    def __call__(self, path, offset, nbytes, halt=None):
        self.seen.append(Path(path).name)
        return hash_range(path, offset, nbytes, halt)


# ---- the cache ---------------------------------------------------------------------------------------------------


async def test_every_cached_tensor_with_changed_bytes_is_found_named_removed_and_fetched_again(
    house, tensors, tmp_path, caplog
):
    a, b = house["a"], house["b"]
    manifest = await a.hash(tensors)
    await b.fetch(a, manifest)
    for silently in (False, True):
        store = WeightStore(tmp_path / "b" / "weights", b.me, Peers(house, b.me))  # the device has started anew
        for wanted in manifest[1:]:
            spoil(store.path(wanted.sha256), silently=silently)
        found = await store.fetch(DEPLOYMENT, a.me, manifest, quiet)
        caplog.clear()
        assert await store.verify(found.values(), quiet) == ["t1", "t2", "t3"]
        for wanted in manifest[1:]:
            assert f"tensor {wanted.name} changed on this disk" in caplog.text
            assert not store.path(wanted.sha256).exists()
        again = await store.fetch(DEPLOYMENT, a.me, manifest, quiet)
        assert await store.verify(again.values(), quiet) == []
        assert all(b.has(wanted, tensor) for wanted, tensor in zip(manifest, tensors, strict=True))


async def test_cached_tensors_are_hashed_once_after_each_start_and_again_when_they_were_written(
    house, tensors, tmp_path, monkeypatch
):
    a, b = house["a"], house["b"]
    manifest = await a.hash(tensors)
    found = await b.fetch(a, manifest)
    hashing = Hashing(monkeypatch)
    assert await b.store.verify(found.values(), quiet) == [] and not hashing.seen, "they were hashed as they came"
    store = WeightStore(tmp_path / "b" / "weights", b.me, Peers(house, b.me))
    for times in (4, 0, 0):
        hashing.seen.clear()
        found = await store.fetch(DEPLOYMENT, a.me, manifest, quiet)  # which notes that they are used
        assert await store.verify(found.values(), quiet) == []
        assert len(hashing.seen) == times
    os.utime(store.path(manifest[2].sha256), (5, 5))
    hashing.seen.clear()
    assert await store.verify(found.values(), quiet) == []
    assert hashing.seen == [manifest[2].sha256]


async def test_a_cached_tensor_that_is_gone_is_fetched_again(house, tensors):
    a, b = house["a"], house["b"]
    manifest = await a.hash(tensors)
    found = await b.fetch(a, manifest)
    b.store.path(manifest[3].sha256).unlink()
    assert await b.store.verify(found.values(), quiet) == ["t3"]
    await b.fetch(a, manifest)
    assert b.has(manifest[3], tensors[3])


# ---- files of the owner ------------------------------------------------------------------------------------------


async def test_a_model_file_that_changed_silently_is_refused_until_it_is_touched(tensors, tmp_path, caplog):
    path = Path(tensors[3].path)
    first = await Digests(tmp_path / "digests.json").of(tensors, quiet)
    spoil(path, tensors[3].offset, silently=True)
    digests = Digests(tmp_path / "digests.json")  # the device has started anew
    assert await digests.of(tensors, quiet) == first, "a plan does not wait for the bytes"
    with pytest.raises(ModelError, match=r"changed silently: t3 no longer .*put a good copy there, or `touch` it"):
        await digests.verify(tensors, quiet)
    assert await digests.verify(tensors[:3], quiet), "the others are good"
    with pytest.raises(ModelError, match="changed silently"):  # it stays so
        await digests.verify(tensors, quiet)
    os.utime(path)
    again = await digests.verify(tensors, quiet)
    key = tensors[3].path, tensors[3].offset, tensors[3].nbytes
    assert again[key] == hash_range(*key) != first[key]
    assert await Digests(tmp_path / "digests.json").verify(tensors, quiet) == again


async def test_a_good_copy_in_its_place_is_taken(tensors, tmp_path):
    path = Path(tensors[3].path)
    good = held(tensors[3])
    first = await Digests(tmp_path / "digests.json").of(tensors, quiet)
    spoil(path, tensors[3].offset, silently=True)
    digests = Digests(tmp_path / "digests.json")
    with pytest.raises(ModelError):
        await digests.verify(tensors, quiet)
    put(path, tensors[3].offset, good)
    assert await digests.verify(tensors, quiet) == first


async def test_model_files_are_hashed_once_after_each_start(tensors, tmp_path, monkeypatch):
    hashing = Hashing(monkeypatch)
    for _ in range(2):
        digests = Digests(tmp_path / "digests.json")
        for times in (4, 0):
            hashing.seen.clear()
            await digests.verify(tensors, quiet)
            await digests.of(tensors, quiet)
            assert len(hashing.seen) == times
    spoil(Path(tensors[2].path), tensors[2].offset)  # its time says so: a new version, which is hashed
    hashing.seen.clear()
    await digests.verify(tensors, quiet)
    assert len(hashing.seen) == 4


async def test_digests_are_remembered_per_version_of_a_file(tensors, tmp_path, monkeypatch):
    digests = Digests(tmp_path / "digests.json")
    first = await digests.of(tensors, quiet)
    with monkeypatch.context() as patched:
        patched.setattr(digests_module, "hash_range", None)
        assert await Digests(tmp_path / "digests.json").of(tensors, quiet) == first
    spoil(Path(tensors[3].path), tensors[3].offset)
    os.utime(tensors[3].path, (5, 5))
    key = tensors[3].path, tensors[3].offset, 200_000
    assert (await digests.of(tensors, quiet))[key] == hash_range(*key) != first[key]


async def test_of_too_many_files_the_longest_known_are_hashed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(digests_module, "MAX_FILES", 2)
    hashing = Hashing(monkeypatch)
    tensors = {name: checkpoint(tmp_path / name, [20])[0] for name in "abc"}

    async def of(names):
        hashing.seen.clear()
        await Digests(tmp_path / "digests.json").of([tensors[name] for name in names], quiet)
        return "".join(hashing.seen)

    assert await of("ab") == "ab" and await of("ba") == ""
    os.utime(tensors["a"].path, (5, 5))
    assert await of("a") == "a", "it is the newest now"
    assert await of("c") == "c" and await of("ac") == "" and await of("b") == "b"


@pytest.mark.parametrize("remembered", ["not json", "[]", '{"a": 1}', '{"a": {"version": "1", "tensors": {"x": 1}}}'])
async def test_a_short_or_missing_file_is_a_clear_line_and_a_damaged_memory_none(tensors, tmp_path, remembered):
    (tmp_path / "digests.json").write_text(remembered)
    digests = Digests(tmp_path / "digests.json")
    assert digests.find("0" * 64) is None
    beyond = checkpoint(tmp_path / "short", [10])[0]
    os.truncate(beyond.path, 105)
    with pytest.raises(ModelError, match="ends before"):
        await digests.of([beyond], quiet)
    gone(beyond.path)
    with pytest.raises(ModelError, match="cannot be read"):
        await digests.of([beyond], quiet)
    os.mkfifo(beyond.path)
    with pytest.raises(ModelError, match="is a pipe"):
        await digests.of([beyond], quiet)


# ---- both, for a stage -------------------------------------------------------------------------------------------


async def test_a_stage_s_weights_are_checked_wherever_they_lie(house, tensors, tmp_path):
    a, b = house["a"], house["b"]
    manifest = await a.hash(tensors)
    work = StageWork(0, 0, 1, tuple(manifest), None, None, 1)
    assign = Assign(DEPLOYMENT, 1, "m", "{}", "float32", 1, 8, 8, 1, 1, "no-bubble", 1, (work,), a.me)
    own = StageWeights(a.me, a.store, a.digests, lambda _: {one.name: one for one in tensors}, lambda: None)
    found = await own.fetch(assign, a.me, quiet)
    assert found == {one.name: one for one in tensors} and await own.verify(found.values(), quiet)
    other = StageWeights(b.me, b.store, b.digests, lambda _: {one.name: one for one in tensors}, lambda: None)
    found = await other.fetch(assign, a.me, lambda phase, done, total: None)
    assert all(held(one) == held(found[one.name]) for one in tensors)
    assert await other.verify(found.values(), lambda phase, done, total: None)
    spoil(Path(found["t3"].path))
    assert not await other.verify(found.values(), lambda phase, done, total: None)
    nothing = replace(work, tensors=(replace(manifest[3], sha256=""),))
    with pytest.raises(ModelError, match="tensor t3 is missing from the model's files"):
        await own.fetch(replace(assign, work=(nothing,)), b.me, quiet)
