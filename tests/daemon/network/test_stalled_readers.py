"""A device that asks for bytes and does not take them (asleep, frozen, hostile) does not hold up the others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from peerllm.daemon.network.speed import bandwidth_probe
from peerllm.daemon.network.speed.bandwidth_probe import MAX_PROBE_BYTES, add_probe
from peerllm.daemon.weights import offers as offers_module
from peerllm.daemon.weights.digests import Digests
from peerllm.daemon.weights.exchange.holders import ROUTE
from peerllm.daemon.weights.offers import Offers
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import TensorAt

WAIT_S = 10.0
LARGE_BYTES = 32 << 20  # more than the kernel's buffers take


async def _serve(app: web.Application) -> tuple[web.AppRunner, int]:
    runner = web.AppRunner(app)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, sock).start()
    return runner, sock.getsockname()[1]


async def _ask(port: int, path: str) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    await asyncio.get_running_loop().sock_sendall(sock, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return sock


async def _ask_and_sleep(port: int, path: str) -> socket.socket:
    sock = await _ask(port, path)
    await asyncio.get_running_loop().sock_recv(sock, 1)  # its turn has come
    return sock


async def _get(port: int, path: str) -> int:
    async with (
        asyncio.timeout(WAIT_S),
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        return len(await response.read())


async def test_a_probe_gives_up_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth_probe, "PROBE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(bandwidth_probe, "MAX_PROBE_BYTES", LARGE_BYTES)
    app = web.Application()
    add_probe(app, lambda: True)
    runner, port = await _serve(app)
    with await _ask_and_sleep(port, f"/probe/{LARGE_BYTES}"):
        async with asyncio.timeout(WAIT_S):
            while await _get(port, f"/probe/{MAX_PROBE_BYTES}") != MAX_PROBE_BYTES:
                pass  # told to ask again later
    await runner.cleanup()


async def _offering(tmp_path: Path, sizes: Sequence[int]) -> tuple[web.AppRunner, int, list[str]]:
    """A device's name is in the request here; paths of tensors of these sizes."""
    (tmp_path / "file").write_bytes(bytes(LARGE_BYTES))
    digests = Digests(tmp_path / "digests.json")
    tensors = [TensorAt("t", "U8", (size,), str(tmp_path / "file"), 0, size) for size in sizes]
    hashes = (await digests.of(tensors, lambda done, total: None)).values()
    store = WeightStore(tmp_path / "weights", "a" * 64, None)  # type: ignore[arg-type]
    app = web.Application()
    app.router.add_get(ROUTE, Offers(store, digests, lambda request: request.query.get("from", "")).handle)
    return *await _serve(app), [f"/weights/{sha256}" for sha256 in hashes]


async def test_weights_give_up_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers_module, "MAX_TRANSFERS", 1)
    monkeypatch.setattr(offers_module, "STALL_TIMEOUT_S", 0.3)
    runner, port, (large, small) = await _offering(tmp_path, (LARGE_BYTES, 100))
    with await _ask_and_sleep(port, large):
        assert await _get(port, small) == 100
    await runner.cleanup()


async def test_a_device_that_reads_slowly_leaves_turns_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers_module, "MAX_TRANSFERS", 2)
    monkeypatch.setattr(offers_module, "MAX_TRANSFERS_OF_DEVICE", 1)
    runner, port, (large, small) = await _offering(tmp_path, (LARGE_BYTES, 100))
    path = f"{large}?from=slow"
    with await _ask_and_sleep(port, path), await _ask(port, path), await _ask(port, path):
        assert await _get(port, f"{small}?from=other") == 100
    await runner.cleanup()
