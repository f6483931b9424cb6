"""What a follower keeps of a source: checked before it is believed, and had again while the source is there."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

from peerllm.daemon.control_messages import Answer
from peerllm.daemon.successor.equipment import Equipment
from peerllm.daemon.successor.inheritance import MANIFEST
from peerllm.daemon.weights.weight_store import WeightStore
from tests.daemon.weights.test_changed_bytes import spoil
from tests.daemon.weights.weight_house import DEPLOYMENT, Peers, WeightHouse, checkpoint, held

BOUND_S = 20.0


async def test_what_changed_on_the_disk_is_found_named_and_fetched_again(tmp_path, caplog):
    """The small files too: a tokenizer with other bytes would turn every answer into another text."""
    files, weights = checkpoint(tmp_path / "files", (300, 400)), checkpoint(tmp_path / "weights", (5000,))
    files = [replace(one, name=name) for one, name in zip(files, (MANIFEST, "tokenizer.json"), strict=True)]
    async with WeightHouse(tmp_path, "ab") as house:
        a, b = house["a"], house["b"]
        named, manifest, adopted = await a.hash(files), await a.hash(weights), []

        class Models:
            def adopt(self, deployment, paths, used):
                adopted.append({name: path.read_bytes() for name, path in paths.items()})
                return SimpleNamespace(inheritance=SimpleNamespace(digests=lambda without: manifest, hub=None))

        async def ask(device, question, timeout_s):
            return Answer(0, inherited=tuple(named))

        for changed in (False, True):
            store = WeightStore(tmp_path / "b" / "weights", b.me, Peers(house, b.me))  # the device has started anew
            caplog.clear()
            for one in (*named, *manifest) if changed else ():
                spoil(store.path(one.sha256), silently=True)
            done = asyncio.Event()
            equipment = Equipment(store, Models(), ask, lambda deployment, done=done: done.set())
            equipment.follow(DEPLOYMENT, (a.me, frozenset()))
            await asyncio.wait_for(done.wait(), BOUND_S)
            await equipment.close()
            assert adopted[-1] == {one.name: held(one) for one in files}
            for one, tensor in zip((*named, *manifest), (*files, *weights), strict=True):
                assert store.path(one.sha256).read_bytes() == held(tensor)
                assert (f"tensor {one.name} changed on this disk" in caplog.text) is changed
