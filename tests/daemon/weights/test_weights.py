"""Weights over real sockets: ranges, cuts, lies, damage, several places at once."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from peerllm.codec import encode
from peerllm.daemon.control_messages import Ask, Control, Have
from peerllm.daemon.network.limits.message_sizes import check_size
from peerllm.daemon.weights.digests import hash_range
from peerllm.daemon.weights.exchange import tensor_fetch, wanted_tensor
from peerllm.daemon.weights.exchange.holders import MAX_KEYS
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.errors import BadInputError, LinkError, ModelError, UnavailableError
from tests.daemon.weights.weight_house import DEPLOYMENT, Peers, WeightHouse, checkpoint, digest, held, quiet

SIZES = (0, 4, 50_000, 200_000)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(tensor_fetch, "CUT_WAIT_S", 0.0001)
    monkeypatch.setattr(tensor_fetch, "LEAST_LOOK_S", 0.001)
    monkeypatch.setattr(tensor_fetch, "LOOK_S", 0.05)
    monkeypatch.setattr(tensor_fetch, "OUT_S", 0.05)


@pytest.fixture
def tensors(tmp_path):
    return checkpoint(tmp_path / "model.safetensors", SIZES)


@pytest.fixture
async def house(tmp_path):
    """Three devices: "a" is the source."""
    async with WeightHouse(tmp_path, "abc") as made:
        yield made


@pytest.fixture
async def manifest(house, tensors):
    return await house["a"].hash(tensors)


class Fault:
    """Cuts the first connections of a device after so many bytes, or spoils what it sends."""

    def __init__(self, cuts=0, after=0, spoil=0):
        self.cuts, self.after, self.spoil = cuts, after, spoil
        self.hang, self.hanging = False, asyncio.Event()
        self.seen = Counter()

    async def __call__(self, path, offset, block):
        if self.hang:
            self.hanging.set()
            await asyncio.Event().wait()
        if self.spoil:
            self.spoil -= 1
            return bytes(len(block))
        self.seen[path] += len(block)
        if self.cuts and self.seen[path] > self.after:
            self.cuts -= 1
            self.seen.clear()
            raise LinkError("the link broke")
        return block


# ---- one place ---------------------------------------------------------------------------------------------------


async def test_tensors_come_whole_and_are_fetched_once(house, manifest, tensors):
    seen, b = [], house["b"]
    found = await b.fetch(house["a"], manifest, lambda done, total: seen.append((done, total)))
    for tensor, wanted in zip(tensors, manifest, strict=True):
        assert b.has(wanted, tensor)
        at = found[tensor.name]
        assert (at.path, at.offset, at.nbytes) == (str(b.store.path(wanted.sha256)), 0, tensor.nbytes)
    assert seen[-1] == (250_004, 250_004) and seen == sorted(seen)
    asked = len(house["a"].asked)
    await b.fetch(house["a"], manifest, deployment="e" * 32)
    assert len(house["a"].asked) == asked


async def test_a_cut_is_continued_where_it_broke(house, manifest, tensors):
    house["a"].fault = Fault(cuts=3, after=40_000)
    await house["b"].fetch(house["a"], manifest[3:])
    offsets = [offset for _, _, offset, _ in house["a"].asked]
    assert len(offsets) == 4 and offsets == sorted(set(offsets)) and offsets[1] > 30_000
    assert house["b"].has(manifest[3], tensors[3])
    assert sum(house["a"].sent.values()) == 200_000, "no byte came twice"


async def test_a_fetch_given_up_is_continued_by_the_next(house, manifest, tensors, tmp_path):
    a, b = house["a"], house["b"]
    a.fault = fault = Fault(cuts=1, after=64_000)
    a.fault.hang = False

    async def then_hang(path, offset, block):
        if offset > 64_000:
            fault.hang = True
        return await fault(path, offset, block)

    a.fault = then_hang
    task = asyncio.ensure_future(b.fetch(a, manifest[3:]))
    await asyncio.wait_for(fault.hanging.wait(), 10)
    task.cancel()
    await asyncio.wait({task})
    partial = (tmp_path / "b" / "weights" / "partial" / manifest[3].sha256).stat().st_size
    a.fault = None
    a.asked.clear()
    again = WeightStore(tmp_path / "b" / "weights", b.me, Peers(house, b.me))
    await again.fetch(DEPLOYMENT, a.me, manifest[3:], quiet)
    assert a.asked[0][2] == partial > 0
    assert b.has(manifest[3], tensors[3])


async def test_a_link_that_never_carries_a_byte_is_given_up_with_its_reason(house, manifest, monkeypatch):
    monkeypatch.setattr(tensor_fetch, "PATIENCE_S", 0.3)
    house["a"].fault = Fault(cuts=10**6)
    with pytest.raises(UnavailableError, match="the link broke"):
        await house["b"].fetch(house["a"], manifest[3:])
    assert len(house["a"].asked) >= tensor_fetch.MAX_CUTS


async def test_what_nobody_has_is_given_up_after_a_while(house, tensors, monkeypatch):
    monkeypatch.setattr(tensor_fetch, "PATIENCE_S", 0.2)
    with pytest.raises(UnavailableError, match="no device of the household has them"):
        await house["b"].fetch(house["a"], [digest(tensors[3])])  # which "a" has not hashed


async def test_a_source_that_lies_is_named_not_asked_again_and_leaves_nothing(house, manifest, tmp_path, caplog):
    house["a"].fault = Fault(spoil=10**6)
    with pytest.raises(ModelError, match=r"t2 cannot be had: device-a sent other bytes.*check the model's files"):
        await house["b"].fetch(house["a"], manifest[2:3])
    assert len(house["a"].asked) == 1 and "device-a sent other bytes for tensor t2" in caplog.text
    assert [file for file in (tmp_path / "b").rglob("*") if file.is_file()] == []


async def test_a_damaged_partial_file_heals(house, manifest, tensors, tmp_path):
    b = house["b"]
    partial = tmp_path / "b" / "weights" / "partial" / manifest[2].sha256
    for damage in (b"\0" * 1000, b"\0" * (tensors[2].nbytes + 1), b"\0" * tensors[2].nbytes):
        partial.write_bytes(damage)
        seen = []
        await b.fetch(house["a"], manifest[2:3], lambda done, _, seen=seen: seen.append(done))
        assert b.has(manifest[2], tensors[2])
        assert seen[-1] == tensors[2].nbytes and min(seen) == 0
        b.store.path(manifest[2].sha256).unlink()


async def test_a_partial_file_that_is_complete_needs_nothing_more(house, manifest, tensors, tmp_path):
    (tmp_path / "b" / "weights" / "partial" / manifest[2].sha256).write_bytes(held(tensors[2]))
    await house["b"].fetch(house["a"], manifest[2:3])
    assert not house["a"].asked and house["b"].has(manifest[2], tensors[2])


async def test_two_deployments_fetch_a_tensor_once(house, manifest):
    b = house["b"]
    told = []
    await asyncio.gather(
        b.fetch(house["a"], manifest[3:]),
        b.fetch(house["a"], manifest[3:], lambda *done: told.append(done), deployment="e" * 32),
    )
    assert len(house["a"].asked) == 1 and told[-1] == (200_000, 200_000)


# ---- several places ----------------------------------------------------------------------------------------------


async def test_the_source_sends_each_byte_once_although_two_devices_need_all(house, tmp_path):
    """The manifest names for each tensor the one that gets it from the source; the other waits and takes it there."""
    many = checkpoint(tmp_path / "many", [30_000] * 40)
    fetchers = [house["bc"[n % 2]].me for n in range(40)]
    manifest = [digest(one, fetcher=who) for one, who in zip(many, fetchers, strict=True)]
    await house["a"].hash(many)
    await asyncio.gather(*(house[letter].fetch(house["a"], manifest) for letter in "bc"))
    for letter in "bc":
        assert all(house[letter].has(wanted, one) for wanted, one in zip(manifest, many, strict=True))
    sent = sum(house["a"].sent.values())
    assert sent == 40 * 30_000, f"the source sent {sent / 40 / 30_000:.2f} times the model"


async def test_a_device_that_shall_fetch_for_all_and_does_not_is_not_waited_for(house, manifest, tensors, monkeypatch):
    monkeypatch.setattr(tensor_fetch, "BEGIN_S", 0.05)
    mine = [digest(tensors[3], fetcher=house["c"].me)]
    await house["b"].fetch(house["a"], mine)
    assert house["b"].has(mine[0], tensors[3])
    house["c"].online = False
    monkeypatch.setattr(tensor_fetch, "BEGIN_S", 1000.0)
    mine = [digest(tensors[2], fetcher=house["c"].me)]
    await asyncio.wait_for(house["b"].fetch(house["a"], mine), 10)


async def test_what_the_source_fetches_for_all_is_had_as_soon_as_it_is_there(house, manifest, tensors):
    mine = [digest(tensors[3], fetcher=house["a"].me)]
    await asyncio.wait_for(house["b"].fetch(house["a"], mine), tensor_fetch.BEGIN_S / 2)


async def test_two_devices_that_have_it_share_the_work_and_the_source_has_none(house, tmp_path, monkeypatch):
    monkeypatch.setattr(wanted_tensor, "STEAL_BYTES", 100_000)
    monkeypatch.setattr(tensor_fetch, "WRITE_BYTES", 1 << 14)
    many = checkpoint(tmp_path / "many", [200_000] * 6 + [4_000_000])
    manifest = await house["a"].hash(many)
    await house["b"].fetch(house["a"], manifest)
    async with WeightHouse(tmp_path / "more", "xabc") as other:  # the same stores, and a fourth device
        for letter in "abc":
            other[letter].store, other[letter].offers._kept = house[letter].store, house[letter].store
            other[letter].offers._own = house[letter].digests
        await house["c"].fetch(house["b"], manifest)  # now two have it
        x = other["x"]
        await x.fetch(other["a"], manifest)
        assert all(x.has(wanted, one) for wanted, one in zip(manifest, many, strict=True))
        assert not other["a"].sent, "the source sent what others have"
        shares = [sum(other[letter].sent.values()) for letter in "bc"]
        assert min(shares) > 0.15 * sum(shares), shares
        large = f"/weights/{manifest[-1].sha256}"
        assert other["b"].sent[large] and other["c"].sent[large], "the largest tensor came from one device alone"


async def test_a_device_that_dies_in_the_middle_is_replaced(house, manifest, tensors):
    a, b, c = house["a"], house["b"], house["c"]
    await c.fetch(a, manifest)

    async def die(path, offset, block):
        if offset > 50_000:
            c.online = False
            raise LinkError("it is gone")
        return block

    c.fault = die
    a.sent.clear()
    await b.fetch(a, manifest[3:])
    assert b.has(manifest[3], tensors[3]) and sum(c.sent.values()) >= 50_000
    assert sum(a.sent.values()) + sum(c.sent.values()) == 200_000, "what the dead one sent was kept"


async def test_a_bad_copy_is_fetched_elsewhere_and_its_device_named(house, manifest, tensors, caplog):
    a, b, c = house["a"], house["b"], house["c"]
    await c.fetch(a, manifest)
    path = c.store.path(manifest[3].sha256)
    data = bytearray(path.read_bytes())
    data[1000:1064] = os.urandom(64)
    path.write_bytes(data)
    await b.fetch(a, manifest)
    assert all(b.has(wanted, one) for wanted, one in zip(manifest, tensors, strict=True))
    assert "device-c sent other bytes for tensor t3" in caplog.text and caplog.text.count("other bytes") == 1
    assert len([one for one in c.asked if one[1].endswith(manifest[3].sha256)]) == 1


async def test_looks_go_on_while_a_slow_disk_throws_damaged_bytes_away(house, manifest, tensors, monkeypatch):
    """What is about to be begun anew is whole by count: a look must not have it checked a second time."""
    a, b, c = house["a"], house["b"], house["c"]
    await c.fetch(a, manifest)
    c.fault = Fault(spoil=1000)
    looked, restart, restarts = threading.Event(), wanted_tensor.WantedTensor.restart, []
    look = tensor_fetch.TensorFetch._look

    async def told_look(fetch, group):
        await look(fetch, group)
        if restarts:
            looked.set()

    def slow_restart(tensor):
        restarts.append(tensor.path)
        tensor.path.unlink()
        assert looked.wait(10)
        restart(tensor)

    monkeypatch.setattr(tensor_fetch.TensorFetch, "_look", told_look)
    monkeypatch.setattr(wanted_tensor.WantedTensor, "restart", slow_restart)
    await b.fetch(a, manifest[3:])
    assert restarts and b.has(manifest[3], tensors[3])


async def test_of_two_that_sent_parts_the_one_that_lies_is_found(house, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wanted_tensor, "STEAL_BYTES", 100_000)
    (large,) = checkpoint(tmp_path / "large", [3_000_000])
    a, b = house["a"], house["b"]
    manifest = await a.hash([large])
    for letter in "bc":
        await house[letter].fetch(a, manifest)
    house["c"].fault = Fault(spoil=10**6)
    async with WeightHouse(tmp_path / "more", "x") as other:
        x = other["x"]
        x.store._peers.house = house
        await x.store.fetch(DEPLOYMENT, a.me, manifest, quiet)
        assert x.has(manifest[0], large)
    assert sum(b.sent.values()) > 0 and "device-b" not in caplog.text


# ---- what is asked and told ----------------------------------------------------------------------------------------


async def test_a_path_is_no_name(house, manifest):
    async with aiohttp.ClientSession() as session:
        for name in ("..%2f..%2fetc%2fpasswd", "", "x", "%2fetc", "hub.txt"):
            async with session.get(f"http://127.0.0.1:{house['a'].port}/weights/{name}") as response:
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
async def test_ranges(house, manifest, tensors, header, status, start, stop):
    url = f"http://127.0.0.1:{house['a'].port}/weights/{manifest[2].sha256}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers={"Range": header} if header else {}) as response,
    ):
        assert response.status == status
        if status < 300:
            assert await response.read() == held(tensors[2])[start:stop]


async def test_a_file_that_changed_or_became_a_pipe_is_not_served(house, manifest, tensors):
    path, url = Path(tensors[2].path), f"http://127.0.0.1:{house['a'].port}/weights/{manifest[2].sha256}"
    async with aiohttp.ClientSession() as session:
        for change in (lambda: os.utime(path, (5, 5)), path.unlink, lambda: os.mkfifo(path)):
            change()
            async with session.get(url) as response:
                assert response.status == 404
            assert house["a"].offers.answer(Have((manifest[2].sha256,))).held == ("",)


async def test_who_has_what_is_asked_in_bounded_lists_of_hashes(house, manifest):
    told = house["a"].offers.answer(Have(("0" * 64, manifest[2].sha256)))
    assert told.held == ("", manifest[2].sha256) and told.coming == ()
    for keys in (("x",), ("../" * 21 + "x",), ("0" * 64,) * (MAX_KEYS + 1)):
        with pytest.raises(BadInputError):
            house["a"].offers.answer(Have(keys))
    for stranger in ("hub.txt", "partial", "digests.json"):
        assert house["b"].offers.held(stranger) == ""


def test_the_longest_question_is_no_larger_than_a_device_takes():
    asked = encode(Ask(2**31, Have(("f" * 64,) * MAX_KEYS)), Control)
    check_size(asked[:128], len(asked))


async def test_more_tensors_than_one_look_asks_about_come_all(house, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_fetch, "MAX_ASKED", 10)
    many = checkpoint(tmp_path / "many", [10] * 45)
    manifest = await house["a"].hash(many)
    await house["b"].fetch(house["a"], manifest)
    assert all(hash_range(house["b"].store.path(one.sha256), 0, 10) == one.sha256 for one in manifest)


async def test_a_device_that_answers_nonsense_has_nothing(house, manifest, tensors, monkeypatch):
    from dataclasses import replace

    real = house["c"].offers.answer
    for nonsense in (("",), ("x" * 64,) * 4, ("0" * 64,) * 4):
        monkeypatch.setattr(house["c"].offers, "answer", lambda asked, said=nonsense: replace(real(asked), held=said))
        await house["b"].fetch(house["a"], manifest)
        assert not house["c"].asked
        for one in manifest:
            house["b"].store.path(one.sha256).unlink()
