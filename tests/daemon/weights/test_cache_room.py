"""The cache of weights has a bound, and a disk may be full: what goes first, what never goes, what is said."""

from __future__ import annotations

import errno
import os
from collections import namedtuple

import pytest

from peerllm.daemon.weights import weight_store as module
from peerllm.daemon.weights.exchange import tensor_fetch
from peerllm.daemon.weights.exchange.wanted_tensor import WantedTensor
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.errors import DiskFullError
from tests.daemon.weights.weight_house import DEPLOYMENT, Peers, WeightHouse, checkpoint, quiet

SIZES = (50_000, 200_000)
OTHER = "e" * 32


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(tensor_fetch, "LEAST_LOOK_S", 0.001)


@pytest.fixture
async def house(tmp_path):
    async with WeightHouse(tmp_path, "ab", max_bytes=260_000) as made:
        yield made


@pytest.fixture
async def manifest(house, tmp_path):
    return await house["a"].hash(checkpoint(tmp_path / "model.safetensors", SIZES))


@pytest.fixture
async def another(house, tmp_path):
    """A model of 60,000 bytes."""
    return await house["a"].hash(checkpoint(tmp_path / "other.safetensors", (60_000,)))


def here(home, *wanted):
    return [home.store.path(one.sha256).exists() for one in wanted]


def used_at(home, when, wanted):
    os.utime(home.store.path(wanted.sha256), (when, when))


async def test_the_longest_unused_makes_room_before_anything_is_fetched(house, manifest, another):
    b = house["b"]
    await b.fetch(house["a"], manifest)
    b.store.forget(DEPLOYMENT)
    used_at(b, 2, manifest[0])
    used_at(b, 1, manifest[1])
    await b.fetch(house["a"], another, deployment=OTHER)
    assert here(b, *manifest, *another) == [True, False, True]


async def test_what_is_in_use_never_goes_and_the_bound_is_one(house, manifest, another):
    b = house["b"]
    await b.fetch(house["a"], manifest)
    with pytest.raises(DiskFullError, match=r"60.0 kB of weights do not fit .*take 260 kB; allow more with --cache"):
        await b.fetch(house["a"], another, deployment=OTHER)
    assert here(b, *manifest, *another) == [True, True, False]
    assert await b.store.prune() == 0
    b.store.forget(DEPLOYMENT)
    await b.fetch(house["a"], another, deployment=OTHER)  # it goes on when there is room
    assert here(b, *another) == [True]


async def test_what_was_used_again_goes_last(house, manifest, another):
    b = house["b"]
    await b.fetch(house["a"], manifest)
    b.store.forget(DEPLOYMENT)
    used_at(b, 1, manifest[0])
    used_at(b, 2, manifest[1])
    await b.fetch(house["a"], manifest[:1])
    b.store.forget(DEPLOYMENT)
    await b.fetch(house["a"], another, deployment=OTHER)
    assert here(b, *manifest) == [True, False]


async def test_partial_files_count_and_go_like_others(house, manifest, another, tmp_path):
    b = house["b"]
    partial = tmp_path / "b" / "weights" / "partial" / ("0" * 64)
    partial.write_bytes(bytes(250_000))
    os.utime(partial, (1, 1))
    await b.fetch(house["a"], another)
    assert not partial.exists() and here(b, *another) == [True]


async def test_exactly_what_the_bound_allows_stays(house, manifest):
    b = house["b"]
    await b.fetch(house["a"], manifest)
    b.store.forget(DEPLOYMENT)
    b.store._max_bytes = 250_000
    assert await b.store.prune() == 0
    used_at(b, 1, manifest[0])
    b.store._max_bytes -= 1
    assert await b.store.prune() == 50_000


async def test_a_full_disk_is_said_before_anything_is_fetched_and_unused_weights_make_room(
    house, manifest, another, monkeypatch
):
    b = house["b"]
    usage = namedtuple("Usage", "total used free")
    await b.fetch(house["a"], another, deployment=OTHER)

    def disk_usage(_):
        free = 150_000 + (0 if here(b, *another) == [True] else 60_000)
        return usage(0, 0, module.SPARE_DISK_BYTES + free)

    monkeypatch.setattr(module.shutil, "disk_usage", disk_usage)
    with pytest.raises(DiskFullError, match=r"the disk lacks 50.0 kB for 200 kB of weights at .*; free some space"):
        await b.fetch(house["a"], manifest[1:])
    assert len(house["a"].asked) == 1 and here(b, *another) == [True], "it is in use"
    b.store.forget(OTHER)
    await b.fetch(house["a"], manifest[1:])
    assert here(b, manifest[1], *another) == [True, False]


async def test_a_disk_that_fills_up_midway_is_one_sentence_and_what_came_is_kept(
    house, manifest, monkeypatch, tmp_path
):
    b, real, wrote = house["b"], WantedTensor.write, []
    monkeypatch.setattr(tensor_fetch, "WRITE_BYTES", 1 << 14)

    def write(self, piece, data):
        if sum(wrote) + len(data) > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        wrote.append(len(data))
        real(self, piece, data)

    with monkeypatch.context() as full:
        full.setattr(WantedTensor, "write", write)
        with pytest.raises(DiskFullError, match=r"is full, so weights cannot be written; free some space there"):
            await b.fetch(house["a"], manifest[1:])
    assert not here(b, manifest[1])[0] and not b.store.coming(manifest[1].sha256)
    house["a"].sent.clear()
    await b.fetch(house["a"], manifest[1:])
    assert here(b, manifest[1]) == [True] and sum(house["a"].sent.values()) == 200_000 - sum(wrote)


async def test_a_disk_that_is_full_when_a_device_starts_is_no_reason_not_to(house, manifest, tmp_path, caplog):
    b = house["b"]
    (tmp_path / "closed").write_text("a file, where the directory should be")
    store = WeightStore(tmp_path / "closed" / "weights", b.me, Peers(house, b.me))
    assert "the cache of weights cannot be written" in caplog.text
    assert store.find("0" * 64) is None and await store.prune() == 0
    (tmp_path / "closed").unlink()
    found = await store.fetch(DEPLOYMENT, house["a"].me, manifest, quiet)
    assert len(found) == 2, "it goes on when there is room"
