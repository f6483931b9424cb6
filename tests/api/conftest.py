from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from peerllm.api.server import ApiServer
from tests.api.fake import FakeHousehold, make_model_dir
from tests.api.relay_pair import Pair, relay_pair


@pytest.fixture
async def household(tmp_path: Path) -> FakeHousehold:
    return FakeHousehold(make_model_dir(tmp_path / "model"))


@pytest.fixture
async def server(household: FakeHousehold, tmp_path: Path) -> AsyncIterator[ApiServer]:
    one = ApiServer(household, "127.0.0.1", 0, tmp_path / "data", in_process=True)
    await one.start()
    yield one
    await one.close()


@pytest.fixture
def token(server: ApiServer, tmp_path: Path) -> str:
    return (tmp_path / "data" / "token").read_text().strip()


@pytest.fixture
async def client(server: ApiServer) -> AsyncIterator[aiohttp.ClientSession]:
    """No token: as a program on the same machine."""
    async with aiohttp.ClientSession(server.url) as session:
        yield session


@pytest.fixture
async def successor(household: FakeHousehold, tmp_path: Path) -> AsyncIterator[tuple[aiohttp.ClientSession, Any]]:
    """The device that goes on with the answers of `household`: a client of its API, and its daemon."""
    made = FakeHousehold(household.model.model_dir or tmp_path)
    server = ApiServer(made, "127.0.0.1", 0, tmp_path / "successor", in_process=True)
    await server.start()
    async with aiohttp.ClientSession(server.url) as session:
        yield session, made
    await server.close()


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with relay_pair(tmp_path) as made:
        yield made
