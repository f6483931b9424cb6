"""Devices that give each other weights over real sockets, for tests: stores, offers, and faults put in between."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import aiohttp
from aiohttp import web

from peerllm.daemon.control_messages import TensorDigest
from peerllm.daemon.weights.digests import Digests, hash_range
from peerllm.daemon.weights.exchange.holders import ROUTE
from peerllm.daemon.weights.offers import Offers
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import TensorAt
from peerllm.errors import LinkError, NotFoundError

DEPLOYMENT = "d" * 32


def quiet(done, total):
    pass


def checkpoint(path: Path, sizes, seed: int | None = None) -> list[TensorAt]:
    """A file of random bytes with tensors in it, some bytes apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(sum(sizes) + 7 * len(sizes) + 100))
    tensors, start = [], 100
    for number, nbytes in enumerate(sizes):
        tensors.append(TensorAt(f"t{number}", "U8", (nbytes,), str(path), start, nbytes))
        start += nbytes + 7
    return tensors


def digest(tensor: TensorAt, sha256: str | None = None, **more) -> TensorDigest:
    sha256 = hash_range(tensor.path, tensor.offset, tensor.nbytes) if sha256 is None else sha256
    return TensorDigest(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, sha256, **more)


def held(tensor: TensorAt) -> bytes:
    return Path(tensor.path).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


class Home:
    """One device; `fault`, if set, is asked what becomes of each block that it sends."""

    def __init__(self, house: WeightHouse, letter: str, max_bytes=None):
        self.house, self.me = house, letter * 64
        self.folder = house.folder / letter
        self.digests = Digests(self.folder / "digests.json")
        self.store = WeightStore(self.folder / "weights", self.me, Peers(house, self.me), max_bytes)
        self.offers = Offers(self.store, self.digests, lambda request: str(request.remote))
        self.online, self.fault = True, None
        self.sent: Counter[str] = Counter()  # bytes by path
        self.asked: list[tuple[str, str, int, int]] = []  # who, path, offset, length

    async def fetch(self, source: Home, tensors, progress=quiet, hub=None, deployment=DEPLOYMENT):
        return await self.store.fetch(deployment, source.me, tensors, progress, hub)

    async def hash(self, tensors) -> list[TensorDigest]:
        """The manifest of a model whose files this device has."""
        found = await self.digests.of(tensors, quiet)
        return [digest(tensor, found[tensor.path, tensor.offset, tensor.nbytes]) for tensor in tensors]

    def has(self, wanted: TensorDigest, tensor: TensorAt) -> bool:
        return self.store.path(wanted.sha256).read_bytes() == held(tensor)


class Peers:
    """Implements holders.WeightPeers for one device."""

    def __init__(self, house: WeightHouse, me: str):
        self.house, self.me = house, me

    def devices(self):
        return [one.me for one in self.house.homes.values() if one.online and one.me != self.me]

    def name(self, device):
        return f"device-{device[0]}"

    async def ask(self, device, question, timeout_s):
        await asyncio.sleep(0)
        other = self.house.homes[device]
        if not other.online:
            raise LinkError("it is away")
        return await asyncio.to_thread(other.offers.answer, question)

    async def get(self, device, path, offset, length):
        other = self.house.homes[device]
        other.asked.append((self.me[0], path, offset, length))
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        got = 0
        if not other.online:
            raise LinkError("it is away")
        async with self.house.session.get(f"http://127.0.0.1:{other.port}{path}", headers=headers) as response:
            if response.status == 404:
                raise NotFoundError(path)
            assert response.status == 206
            async for block in response.content.iter_chunked(1 << 14):
                if other.fault is not None:
                    block = await other.fault(path, offset + got, block)
                got += len(block)
                other.sent[path] += len(block)
                yield block


class WeightHouse:
    """Use as an asynchronous context; `house["a"]` is a device."""

    def __init__(self, folder: Path, letters: str, max_bytes=None):
        self.folder = folder
        made = [Home(self, letter, max_bytes) for letter in letters]
        self.homes = {one.me: one for one in made}
        self._runners = []

    def __getitem__(self, letter) -> Home:
        return self.homes[letter * 64]

    async def __aenter__(self):
        self.session = aiohttp.ClientSession()
        for home in self.homes.values():
            app = web.Application()
            app.router.add_get(ROUTE, home.offers.handle)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            home.port = runner.addresses[0][1]
            self._runners.append(runner)
        return self

    async def __aexit__(self, *_):
        await self.session.close()
        for runner in self._runners:
            await runner.cleanup()
