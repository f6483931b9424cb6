"""Tensors from the hub: each device fetches its own by ranges, no byte twice, and everyone else gets them from it."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import replace

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.daemon.control_messages import Assign, HubFiles, StageWork
from peerllm.daemon.decide.assignments import check
from peerllm.daemon.decide.hub_places import check_hub, check_place, hub_key
from peerllm.daemon.weights.digests import hash_range
from peerllm.daemon.weights.exchange import tensor_fetch
from peerllm.daemon.weights.exchange.known_hashes import KnownHashes
from peerllm.daemon.weights.exchange.wanted_tensor import Piece, WantedTensor
from peerllm.daemon.weights.stage_weights import StageWeights
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.weights.checkpoint import read_tensors
from peerllm.errors import BadInputError, LinkError, ModelError, UnavailableError
from tests.daemon.weights.hub_server import COMMIT, hub_server
from tests.daemon.weights.weight_house import DEPLOYMENT, Peers, WeightHouse, checkpoint, digest, held, quiet

MODEL, WEIGHTS = "maker/small", "model.safetensors"
BUFFERED = 1 << 20  # bytes of one connection that are lost with it
HUB = HubFiles(MODEL, COMMIT, (WEIGHTS,))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(tensor_fetch, "CUT_WAIT_S", 0.0001)
    monkeypatch.setattr(tensor_fetch, "LEAST_LOOK_S", 0.001)
    monkeypatch.setattr(tensor_fetch, "LOOK_S", 0.05)
    monkeypatch.setattr(tensor_fetch, "OUT_S", 0.05)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    shutil.copytree(MODEL_DIR, tmp_path / "hub" / MODEL, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    with hub_server(tmp_path / "hub", tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture
async def house(tmp_path):
    async with WeightHouse(tmp_path, "abc") as made:
        yield made


def manifest(tensors=None, **more):
    """What a source tells of tensors that nobody has hashed."""
    tensors = own_tensors() if tensors is None else tensors
    return [digest(one, "", file=0, offset=one.offset, **more) for one in tensors]


def own_tensors():
    return sorted(read_tensors(MODEL_DIR).values(), key=lambda one: one.offset)


def total(tensors):
    return sum(one.nbytes for one in tensors)


async def test_a_device_fetches_its_own_tensors_and_no_other_byte(hub, house):
    tensors = own_tensors()
    mine = tensors[: len(tensors) // 2]
    seen = []
    found = await house["b"].fetch(house["a"], manifest(mine), lambda *done: seen.append(done), hub=HUB)
    for tensor in mine:
        at = found[tensor.name]
        assert house["b"].store.path(at.path.rpartition("/")[2]).read_bytes() == held(tensor)
        assert hash_range(at.path, 0, at.nbytes) == at.path.rpartition("/")[2]
    assert seen[-1] == (total(mine), total(mine)) and seen == sorted(seen)
    assert hub.bodies[WEIGHTS] == total(mine) and len(hub.ranges) < len(mine), "neighbours come in one request"


async def test_each_byte_crosses_the_uplink_once_whoever_needs_it(hub, house):
    """Three devices; all need some tensors of each other, and all of them the last third."""
    tensors = own_tensors()
    third = len(tensors) // 3
    parts = {"a": tensors[:third], "b": tensors[third : 2 * third], "c": tensors[2 * third :]}
    shared = tensors[2 * third :]

    def assigned(letter):
        mine = [one for one in parts[letter] if one not in shared]
        return manifest(mine) + manifest(shared, fetcher=house["b"].me)

    await asyncio.gather(*(house[one].fetch(house["a"], assigned(one), hub=HUB) for one in "abc"))
    assert hub.bodies[WEIGHTS] == total(tensors)
    # Later another plan: the others have all that "a" lacks, so the hub is not asked again.
    found = await house["a"].fetch(house["a"], manifest(), hub=HUB, deployment="e" * 32)
    assert hub.bodies[WEIGHTS] == total(tensors)
    for tensor in tensors:
        assert held(found[tensor.name]) == held(tensor)


async def test_a_download_that_broke_goes_on_where_it_was(hub, house, tmp_path):
    tensors = own_tensors()
    hub.cuts = 7
    await house["b"].fetch(house["a"], manifest(), hub=HUB)
    assert hub.cuts == 0
    assert hub.bodies[WEIGHTS] < total(tensors) + 7 * BUFFERED, "only what was under way came twice"
    large = max(tensors, key=lambda one: one.nbytes)
    half = large.nbytes // 2
    (wanted,) = manifest([large])
    partial = tmp_path / "c" / "weights" / "partial" / hub_key(HUB, 0, wanted.offset, wanted.nbytes)
    partial.write_bytes(held(large)[:half])  # as it lies there after a restart
    house["b"].online = False
    hub.bodies.clear()
    await house["c"].fetch(house["a"], [wanted], hub=HUB)
    assert hub.bodies[WEIGHTS] == large.nbytes - half


async def test_what_was_fetched_once_is_known_by_its_hash_after_a_restart_too(hub, house, tmp_path):
    await house["b"].fetch(house["a"], manifest(), hub=HUB)
    hub.bodies.clear()
    again = WeightStore(tmp_path / "b" / "weights", house["b"].me, Peers(house, house["b"].me))
    await again.fetch(DEPLOYMENT, house["a"].me, manifest(), quiet, HUB)
    assert not hub.bodies
    one = manifest()[5]
    key = hub_key(HUB, 0, one.offset, one.nbytes)
    assert again.held(key) == again.known(key) != ""
    hub.refuse["/"] = 503, "Down"
    other = await house["c"].fetch(house["a"], [replace(one, sha256=again.known(key))], hub=HUB)
    assert other[one.name].nbytes == one.nbytes


async def lie(house, letter, tensor, tmp_path):
    """That device has other bytes, and says that they are what the hub has at the tensor's place; their hash."""
    (other,) = checkpoint(tmp_path / f"other {letter}", [tensor.nbytes])
    (told,) = await house[letter].hash([other])
    house[letter].offers.held = lambda asked: told.sha256
    return told.sha256


async def test_where_devices_differ_about_a_hash_the_hub_decides(hub, house, tmp_path):
    tensor = own_tensors()[3]
    (wanted,) = manifest([tensor])
    await house["a"].fetch(house["a"], [wanted], hub=HUB)
    await lie(house, "c", tensor, tmp_path)
    found = await house["b"].fetch(house["a"], [wanted], hub=HUB)
    assert held(found[tensor.name]) == held(tensor)
    assert hub.bodies[WEIGHTS] == 2 * tensor.nbytes
    honest = hash_range(tensor.path, tensor.offset, tensor.nbytes)
    await house["c"].fetch(house["a"], [replace(wanted, sha256=honest)], hub=HUB)
    assert house["c"].store.path(honest).read_bytes() == held(tensor), "a hash of the manifest is never another's"


async def test_what_a_device_alone_says_of_a_place_counts_for_that_deployment_only(hub, house, tmp_path):
    tensor = own_tensors()[3]
    (wanted,) = manifest([tensor])
    key = hub_key(HUB, 0, wanted.offset, wanted.nbytes)
    told = await lie(house, "c", tensor, tmp_path)
    found = await house["a"].fetch(house["c"], [wanted], hub=HUB)
    assert found[tensor.name].path.endswith(told), "nobody else says anything"
    assert house["a"].store.known(key) == house["a"].offers.held(key) == "", "nobody hears it from this device"
    house["c"].online = False
    again = WeightStore(tmp_path / "a" / "weights", house["a"].me, Peers(house, house["a"].me))
    assert await again.fetch(DEPLOYMENT, house["c"].me, [wanted], quiet, HUB) == found and not hub.bodies
    for deployment, source in ((DEPLOYMENT, "b"), ("e" * 32, "c")):
        again._known = KnownHashes(tmp_path / f"unknown to {source}")
        hub.bodies.clear()
        other = await again.fetch(deployment, house[source].me, [wanted], quiet, HUB)
        assert held(other[tensor.name]) == held(tensor) and hub.bodies[WEIGHTS] == tensor.nbytes
    assert again.held(key) == again.known(key) != ""


async def test_a_device_s_part_of_a_tensor_is_never_taken_for_the_hub_s(hub, house, tmp_path, monkeypatch):
    """It sends all but the last bytes, and is gone; in a new process as well."""
    tensor = max(own_tensors(), key=lambda one: one.nbytes)
    (wanted,) = manifest([tensor])
    await lie(house, "c", tensor, tmp_path)

    async def gone(path, offset, block):
        if offset + len(block) >= tensor.nbytes:
            house["c"].online = False
            raise LinkError("it is gone")
        return block

    house["c"].fault = gone
    hub.refuse["/"] = 503, "Down"
    monkeypatch.setattr(tensor_fetch, "PATIENCE_S", 0.3)
    with pytest.raises(UnavailableError):
        await house["a"].fetch(house["b"], [wanted], hub=HUB)
    (left,) = (tmp_path / "a" / "weights" / "partial").iterdir()
    assert 0 < left.stat().st_size < tensor.nbytes
    hub.refuse.clear()
    again = WeightStore(tmp_path / "a" / "weights", house["a"].me, Peers(house, house["a"].me))
    found = await again.fetch(DEPLOYMENT, house["b"].me, [wanted], quiet, HUB)
    assert held(found[tensor.name]) == held(tensor) and hub.bodies[WEIGHTS] == tensor.nbytes


async def test_what_lies_here_already_is_not_fetched_once_its_hash_is_said(hub, house):
    tensors = own_tensors()[:4]
    await house["b"].fetch(house["a"], manifest(tensors), hub=HUB)
    known = [replace(one, sha256=hash_range(at.path, at.offset, at.nbytes))
             for one, at in zip(manifest(tensors), tensors, strict=True)]  # fmt: skip
    await house["a"].fetch(house["b"], known)
    sent, seen = house["b"].sent.total(), []
    await house["a"].fetch(house["b"], manifest(tensors), lambda *done: seen.append(done), HUB, "e" * 32)
    assert house["b"].sent.total() == sent and hub.bodies[WEIGHTS] == total(tensors)
    assert seen[-1] == (total(tensors), total(tensors))


async def test_who_has_it_from_another_device_sends_it_too(hub, house):
    """Once its hash is said it is asked for by that: so the source sends each byte once."""
    tensors = own_tensors()[:4]
    await house["b"].fetch(house["b"], manifest(tensors), hub=HUB)
    await house["c"].fetch(house["b"], manifest(tensors), hub=HUB)
    sent = house["b"].sent.total()
    await house["a"].fetch(house["b"], manifest(tensors), hub=HUB)
    assert house["b"].sent.total() == sent and house["c"].sent.total() == total(tensors)


async def test_no_credentials_of_a_file_go_to_the_hub_and_the_environment_s_proxy_is_used(
    hub, house, tmp_path, monkeypatch
):
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent = []
    real = hub._file
    monkeypatch.setattr(hub, "_file", lambda asked, *rest: (sent.append(asked.headers), real(asked, *rest)))
    await house["a"].fetch(house["a"], manifest()[:1], hub=HUB)
    monkeypatch.setenv("http_proxy", hub.url.replace("//", "//me:word@"))
    template = "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    await house["b"].store.fetch(DEPLOYMENT, house["b"].me, manifest()[1:2], quiet, HUB, "token")
    assert [one.get("Authorization") for one in sent] == [None, "Bearer token"]
    assert [one.get("Proxy-Authorization") for one in sent] == [None, "Basic bWU6d29yZA=="]


async def test_a_hub_whose_bytes_are_others_than_the_manifest_s_is_named(hub, house, tmp_path):
    tensor = own_tensors()[3]
    data = bytearray((tmp_path / "hub" / MODEL / WEIGHTS).read_bytes())
    data[tensor.offset : tensor.offset + 64] = os.urandom(64)
    (tmp_path / "hub" / MODEL / WEIGHTS).write_bytes(data)
    honest = hash_range(tensor.path, tensor.offset, tensor.nbytes)
    with pytest.raises(ModelError, match="the hub sent other bytes than the manifest says"):
        await house["b"].fetch(house["a"], [digest(tensor, honest, file=0, offset=tensor.offset)], hub=HUB)


@pytest.mark.parametrize(
    ("parts", "refusal"), [(False, None), (True, (403, "GatedRepo")), (True, (404, "EntryNotFound"))]
)
async def test_a_hub_that_does_not_give_it_is_one_clear_line(hub, house, parts, refusal):
    hub.parts = parts
    if refusal:
        hub.refuse[f"/{MODEL}/resolve"] = refusal
    with pytest.raises(ModelError, match=r"tensor .* cannot be had: the hub does not give it"):
        await house["b"].fetch(house["a"], manifest()[:3], hub=HUB)


async def test_the_owner_s_token_is_used_for_the_owner_s_models_alone(hub, house, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    sent = []
    real = hub._file
    monkeypatch.setattr(
        hub, "_file", lambda asked, *rest: (sent.append(asked.headers.get("Authorization")), real(asked, *rest))
    )
    await house["b"].fetch(house["a"], manifest()[:1], hub=HUB)
    await house["c"].store.fetch(DEPLOYMENT, house["c"].me, manifest()[1:2], quiet, HUB, "secret")
    assert sent == [None, "Bearer secret"]


@pytest.mark.parametrize(
    "bad",
    [
        replace(HUB, model="http://evil/x"), replace(HUB, model="../up"), replace(HUB, model="a/../b"),
        replace(HUB, model="a/b/c"), replace(HUB, model="a\n/b"), replace(HUB, model="a?b"),
        replace(HUB, commit="main"),
        replace(HUB, commit="C" * 40), replace(HUB, files=()), replace(HUB, files=("../x.safetensors",)),
        replace(HUB, files=("/etc/x.gguf",)), replace(HUB, files=("a/../x.gguf",)), replace(HUB, files=("x.bin",)),
        replace(HUB, files=("http://x/y.gguf",)), replace(HUB, files=("x.gguf?y",)),
        replace(HUB, files=("x.gguf#y.gguf",)),
        replace(HUB, files=("%2e%2e/x.gguf",)), replace(HUB, files=("x.gguf",) * 1001),
        replace(HUB, files=("x.gguf\n",)),
    ],
)  # fmt: skip
def test_no_address_comes_from_another_device(bad):
    check_hub(HUB)
    check_hub(None)
    with pytest.raises(BadInputError):
        check_hub(bad)


def test_no_place_outside_the_named_files_is_taken():
    (one,) = manifest(own_tensors()[:1])
    check_place(HUB, one)
    for hub, bad in (
        (HUB, replace(one, file=1)),
        (HUB, replace(one, file=-2)),
        (None, one),
        (HUB, replace(one, offset=-1)),
    ):
        with pytest.raises(BadInputError):
            check_place(hub, bad)


def test_known_hashes_outlive_a_line_that_was_cut_short(tmp_path):
    file = tmp_path / "hub.txt"
    KnownHashes(file).add("a" * 64, "b" * 64)
    file.write_bytes(file.read_bytes() + b"\n" + b"c" * 70)
    known = KnownHashes(file)
    known.add("d" * 64, "e" * 64)
    again = KnownHashes(file)
    assert [again.get(one * 64) for one in "acd"] == ["b" * 64, "", "e" * 64]


def test_known_hashes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("peerllm.daemon.weights.exchange.known_hashes.MAX_KNOWN", 4)
    known = KnownHashes(tmp_path / "hub.txt")
    for number in range(9):
        known.add(f"{number:064x}", "b" * 64)
    again = KnownHashes(tmp_path / "hub.txt")
    kept = [number for number in range(9) if again.get(f"{number:064x}")]
    assert len(kept) <= 4 and kept[-1] == 8 and kept == [number for number in range(9) if known.get(f"{number:064x}")]


def test_an_assignment_is_refused_before_anything_is_asked_for():
    tensor = digest(own_tensors()[3], "", file=0, offset=own_tensors()[3].offset)
    work = StageWork(0, 0, 1, (tensor,), None, None, 1)
    assign = Assign(DEPLOYMENT, 1, "m", "{}", "float32", 1, 8, 8, 1, 1, "no-bubble", 1, (work,), "a" * 64, hub=HUB)
    check(assign, 1 << 30, own=False)
    for bad in (replace(assign, hub=None), replace(assign, hub=replace(HUB, model="../up"))):
        with pytest.raises(BadInputError):
            check(bad, 1 << 30, own=False)
    for unknown in (replace(tensor, file=1), replace(tensor, file=-1)):
        with pytest.raises(BadInputError):
            check(replace(assign, work=(replace(work, tensors=(unknown,)),)), 1 << 30, own=False)


async def test_another_device_s_assignment_gets_no_token():
    seen = []

    class Store:
        async def fetch(self, deployment, source, tensors, progress, hub, token):
            seen.append(token)
            return {}

    weights = StageWeights("a" * 64, Store(), None, lambda _: {}, lambda: "secret")
    work = StageWork(0, 0, 1, tuple(manifest()[:1]), None, None, 1)
    assign = Assign(DEPLOYMENT, 1, "m", "{}", "float32", 1, 8, 8, 1, 1, "no-bubble", 1, (work,), "a" * 64, hub=HUB)
    for coordinator in ("a" * 64, "b" * 64):
        await weights.fetch(assign, coordinator, quiet)
    assert seen == ["secret", None]


def test_of_a_tensor_that_several_sent_its_beginning_is_kept(tmp_path):
    """A file with a gap would pass for a beginning after a restart."""
    one = WantedTensor(digest(own_tensors()[0], "0" * 64), "0" * 64, tmp_path)
    one.resume()
    first = one.take("b")
    first.stop = 1000
    one.running.append(second := Piece(one, 5000, one.nbytes))
    one.write(first, bytes(600))
    one.write(second, bytes(100))
    one.keep_beginning()
    assert one.path.stat().st_size == 600
    assert WantedTensor(one.digest, "0" * 64, tmp_path).resume() == 600
