"""Weights over a real socket: ranges, cuts, lies, damage, the disk, the bound."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import namedtuple
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from peerllm.daemon.control_messages import TensorDigest
from peerllm.daemon.weights import weight_store as module
from peerllm.daemon.weights.digests import Digests, hash_range
from peerllm.daemon.weights.offers import ROUTE, Offers
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import TensorAt
from peerllm.errors import LinkError, ModelError, NotFoundError, RefusedError, UnavailableError

D = "d" * 32
SOURCE = "a" * 64


class Link:
    """GETs with a Range to one port; cuts after `cut_after` bytes while `cuts` last, or changes the bytes."""

    def __init__(self):
        self.port, self.asked, self.cuts, self.cut_after, self.spoil = 0, [], 0, 0, 0
        self.hang, self.hanging = False, asyncio.Event()

    async def get(self, device, path, offset, length):
        assert device == SOURCE
        self.asked.append((path, offset, length))
        if self.hang and offset:
            self.hanging.set()
            await asyncio.Event().wait()
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        got = 0
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}{path}", headers=headers) as response,
        ):
            if response.status == 404:
                raise NotFoundError(path)
            assert response.status == 206
            assert response.headers["Content-Range"].startswith(f"bytes {offset}-")
            async for block in response.content.iter_chunked(1 << 14):
                if self.spoil:
                    self.spoil -= 1
                    block = bytes(len(block))
                if self.cuts and got + len(block) > self.cut_after:
                    self.cuts -= 1
                    yield block[: self.cut_after - got]
                    raise LinkError("the link broke")
                got += len(block)
                yield block


@asynccontextmanager
async def serving(offers):
    app = web.Application()
    app.router.add_get(ROUTE, offers.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield runner.addresses[0][1]
    await runner.cleanup()


@pytest.fixture
def checkpoint(tmp_path):
    """A file of 300 kB with tensors in it, and their digests."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(300_000))
    tensors, start = [], 100
    for i, nbytes in enumerate((0, 4, 50_000, 200_000)):
        tensors.append(TensorAt(f"t{i}", "U8", (nbytes,), str(path), start, nbytes))
        start += nbytes + 7
    return tensors


def digest(tensor, sha256=None):
    sha256 = sha256 or hash_range(tensor.path, tensor.offset, tensor.nbytes)
    return TensorDigest(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, sha256)


@pytest.fixture
async def link(checkpoint):
    offers = Offers()
    offers.offer(D, {digest(tensor).sha256: tensor for tensor in checkpoint})
    async with serving(offers) as port:
        made = Link()
        made.port, made.offers = port, offers
        yield made


@pytest.fixture
def store(tmp_path, link, monkeypatch):
    monkeypatch.setattr(module, "CUT_WAIT_S", 0.001)
    return WeightStore(tmp_path / "weights", link.get)


def held(tensor):
    return Path(tensor.path).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def change(tensor):
    path, place = Path(tensor.path), tensor.offset
    data = path.read_bytes()
    path.write_bytes(data[:place] + b"changed!" + data[place + 8 :])
    os.utime(path, (5, 5))


def quiet(done, total):
    pass


async def test_tensors_come_whole_and_are_fetched_once(store, link, checkpoint):
    seen = []
    digests = [digest(tensor) for tensor in checkpoint]
    await store.fetch(D, SOURCE, digests, lambda done, total: seen.append((done, total)))
    for tensor, wanted in zip(checkpoint, digests, strict=True):
        assert store.path(wanted.sha256).read_bytes() == held(tensor)
    assert seen[-1] == (250_004, 250_004) and seen == sorted(seen)
    asked = len(link.asked)
    await store.fetch("e" * 32, SOURCE, digests, quiet)
    assert len(link.asked) == asked


async def test_a_cut_is_continued_where_it_broke(store, link, checkpoint):
    link.cuts, link.cut_after = 3, 40_000
    wanted = digest(checkpoint[3])
    await store.fetch(D, SOURCE, [wanted], quiet)
    assert [offset for _, offset, _ in link.asked] == [0, 40_000, 80_000, 120_000]
    assert hash_range(store.path(wanted.sha256), 0, wanted.nbytes) == wanted.sha256


async def test_a_fetch_given_up_is_continued_by_the_next(store, link, checkpoint, tmp_path):
    wanted = digest(checkpoint[3])
    link.cuts, link.cut_after, link.hang = 1, 64_000, True
    task = asyncio.ensure_future(store.fetch(D, SOURCE, [wanted], quiet))
    await asyncio.wait_for(link.hanging.wait(), 10)
    task.cancel()
    await asyncio.wait({task})
    link.hang = False
    del link.asked[:]
    partial = (tmp_path / "weights" / "partial" / wanted.sha256).stat().st_size
    await WeightStore(tmp_path / "weights", link.get).fetch(D, SOURCE, [wanted], quiet)
    assert link.asked[0][1] == partial > 0
    assert hash_range(store.path(wanted.sha256), 0, wanted.nbytes) == wanted.sha256


async def test_a_link_that_never_carries_a_byte_is_given_up(store, link, checkpoint):
    link.cuts, link.cut_after = 1000, 0
    with pytest.raises(UnavailableError, match="the link broke"):
        await store.fetch(D, SOURCE, [digest(checkpoint[3])], quiet)
    assert len(link.asked) == module.MAX_CUTS


async def test_only_cuts_in_a_row_without_a_byte_between_them_count(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CUT_WAIT_S", 0.0)
    tensor, parts = checkpoint[2], [*[0] * (module.MAX_CUTS - 1), 1] * 3
    asked = []

    async def get(device, path, offset, length):
        asked.append(offset)
        some = parts.pop(0) if parts else length
        yield held(tensor)[offset : offset + some]
        if some < length:
            raise LinkError("the link broke")

    wanted = digest(tensor)
    await WeightStore(tmp_path / "weights", get).fetch(D, SOURCE, [wanted], quiet)
    assert len(asked) == 3 * module.MAX_CUTS + 1 and asked[-1] == 3
    parts[:] = [0] * module.MAX_CUTS
    with pytest.raises(UnavailableError, match="the link broke"):
        await WeightStore(tmp_path / "others", get).fetch(D, SOURCE, [wanted], quiet)


async def test_wrong_bytes_are_fetched_again_once(store, link, checkpoint):
    link.spoil = 1
    wanted = digest(checkpoint[2])
    seen = []
    await store.fetch(D, SOURCE, [wanted], lambda done, _: seen.append(done))
    assert [offset for _, offset, _ in link.asked] == [0, 0]
    assert hash_range(store.path(wanted.sha256), 0, wanted.nbytes) == wanted.sha256
    assert seen[-1] == wanted.nbytes and min(seen) == 0


async def test_a_source_that_lies_is_refused_and_leaves_nothing(store, link, checkpoint, tmp_path):
    lie = digest(checkpoint[2], sha256="f" * 64)
    link.offers.offer(D, {"f" * 64: checkpoint[2]})
    with pytest.raises(ModelError, match="came twice with other bytes"):
        await store.fetch(D, SOURCE, [lie], quiet)
    assert len(link.asked) == 2
    assert [file for file in (tmp_path / "weights").rglob("*") if file.is_file()] == []


async def test_a_damaged_partial_file_heals(store, link, checkpoint, tmp_path):
    wanted = digest(checkpoint[2])
    partial = tmp_path / "weights" / "partial" / wanted.sha256
    for damage in (b"\0" * 1000, b"\0" * (wanted.nbytes + 1), b"\0" * wanted.nbytes):
        partial.write_bytes(damage)
        await store.fetch(D, SOURCE, [wanted], quiet)
        assert hash_range(store.path(wanted.sha256), 0, wanted.nbytes) == wanted.sha256
        store.path(wanted.sha256).unlink()


async def test_a_partial_file_that_is_complete_needs_nothing_more(store, link, checkpoint, tmp_path):
    wanted = digest(checkpoint[2])
    (tmp_path / "weights" / "partial" / wanted.sha256).write_bytes(held(checkpoint[2]))
    await store.fetch(D, SOURCE, [wanted], quiet)
    assert not link.asked and store.path(wanted.sha256).read_bytes() == held(checkpoint[2])


async def test_a_withdrawn_offer_is_gone_and_a_path_is_no_name(store, link, checkpoint):
    link.offers.withdraw(D)
    with pytest.raises(NotFoundError):
        await store.fetch(D, SOURCE, [digest(checkpoint[2])], quiet)
    async with aiohttp.ClientSession() as session:
        for path in (f"/weights/{D}/..%2f..%2fetc%2fpasswd", f"/weights/{D}/", "/weights/x/y", f"/weights/{D}/%2fetc"):
            async with session.get(f"http://127.0.0.1:{link.port}{path}") as response:
                assert response.status == 404


@pytest.mark.parametrize(
    ("header", "status", "start", "stop"),
    [
        (None, 200, 0, 50_000),
        ("bytes=0-9", 206, 0, 10),
        ("bytes=100-", 206, 100, 50_000),
        ("bytes=-7", 206, 49_993, 50_000),
        ("bytes=49999-99999", 206, 49_999, 50_000),
        ("bytes=50000-", 416, 0, 0),
        ("bytes=9-3", 400, 0, 0),
        ("bytes=a-b", 400, 0, 0),
        ("bytes=0-1,3-4", 400, 0, 0),
    ],
)
async def test_ranges(link, checkpoint, header, status, start, stop):
    tensor = checkpoint[2]
    url = f"http://127.0.0.1:{link.port}/weights/{D}/{digest(tensor).sha256}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers={"Range": header} if header else {}) as response,
    ):
        assert response.status == status
        if status < 300:
            assert await response.read() == held(tensor)[start:stop]


async def test_two_deployments_fetch_a_tensor_once(store, link, checkpoint):
    wanted, other = digest(checkpoint[3]), "e" * 32
    link.offers.offer(other, {wanted.sha256: checkpoint[3]})  # either may be the one that fetches
    await asyncio.gather(store.fetch(D, SOURCE, [wanted], quiet), store.fetch(other, SOURCE, [wanted], quiet))
    assert len(link.asked) == 1


async def test_a_full_disk_is_said_before_anything_is_fetched(store, link, checkpoint, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, module.SPARE_DISK_BYTES + 1000))
    with pytest.raises(RefusedError, match=r"lacks 199 kB for 200 kB"):
        await store.fetch(D, SOURCE, [digest(checkpoint[3])], quiet)
    assert not link.asked


async def test_pruning_takes_the_longest_unused_and_never_what_is_used(link, checkpoint, tmp_path):
    store = WeightStore(tmp_path / "weights", link.get, max_bytes=210_000)
    small, large = digest(checkpoint[2]), digest(checkpoint[3])
    await store.fetch(D, SOURCE, [small, large], quiet)
    assert await store.prune() == 0
    store.forget(D)
    os.utime(store.path(large.sha256), (1, 1))
    os.utime(store.path(small.sha256), (2, 2))
    assert await store.prune() == large.nbytes
    assert store.path(small.sha256).exists()


async def test_nothing_is_pruned_up_to_the_bound_and_what_was_used_again_goes_last(link, checkpoint, tmp_path):
    store = WeightStore(tmp_path / "weights", link.get, max_bytes=250_000)
    small, large = digest(checkpoint[2]), digest(checkpoint[3])
    await store.fetch(D, SOURCE, [small, large], quiet)
    store.forget(D)
    assert await store.prune() == 0, "exactly as much as may be kept"
    os.utime(store.path(large.sha256), (1, 1))
    os.utime(store.path(small.sha256), (2, 2))
    await store.fetch("e" * 32, SOURCE, [large], quiet)
    store.forget("e" * 32)
    store._max_bytes -= 1
    assert await store.prune() == small.nbytes
    assert store.path(large.sha256).exists()


async def test_digests_are_computed_once_per_version_of_a_file(checkpoint, tmp_path, monkeypatch):
    digests = Digests(tmp_path / "digests.json")
    first = await digests.of(checkpoint, quiet)
    assert first[checkpoint[3].path, checkpoint[3].offset, 200_000] == digest(checkpoint[3]).sha256
    assert first[checkpoint[0].path, checkpoint[0].offset, 0] == hashlib.sha256().hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr("peerllm.daemon.weights.digests.hash_range", None)
        assert await Digests(tmp_path / "digests.json").of(checkpoint, quiet) == first
    change(checkpoint[3])
    again = await digests.of(checkpoint, quiet)
    key = (checkpoint[3].path, checkpoint[3].offset, 200_000)
    assert again[key] == digest(checkpoint[3]).sha256 != first[key]


async def test_of_too_many_files_the_longest_known_are_hashed_again(tmp_path, monkeypatch):
    monkeypatch.setattr("peerllm.daemon.weights.digests.MAX_FILES", 2)
    hashed = []

    def hashing(path, offset, nbytes, halt):
        hashed.append(Path(path).name)
        return hash_range(path, offset, nbytes, halt)

    monkeypatch.setattr("peerllm.daemon.weights.digests.hash_range", hashing)
    tensors = {}
    for name in "abc":
        (tmp_path / name).write_bytes(bytes(20))
        tensors[name] = TensorAt(name, "U8", (20,), str(tmp_path / name), 0, 20)
    digests = Digests(tmp_path / "digests.json")

    async def of(names):
        del hashed[:]
        await digests.of([tensors[name] for name in names], quiet)
        return "".join(hashed)

    assert await of("ab") == "ab" and await of("ba") == ""
    change(tensors["a"])
    assert await of("a") == "a", "it is the newest now"
    assert await of("c") == "c" and await of("ac") == "" and await of("b") == "b"


async def test_a_short_or_missing_file_is_a_clear_line(checkpoint, tmp_path):
    digests = Digests(tmp_path / "digests.json")
    (tmp_path / "digests.json").write_text("not json")
    beyond = TensorAt("t", "U8", (10,), checkpoint[0].path, 299_999, 10)
    with pytest.raises(ModelError, match="ends before"):
        await digests.of([beyond], quiet)
    with pytest.raises(ModelError, match="cannot be read"):
        await digests.of([TensorAt("t", "U8", (1,), str(tmp_path / "none"), 0, 1)], quiet)
