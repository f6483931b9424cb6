"""Identities to pair and links to break. Keys are made once: who they belong to is what the tests are about."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from peerllm.transport.dial import dialling_session
from peerllm.transport.identity import Identity, load_or_create


@pytest.fixture(scope="session")
def identities(tmp_path_factory: pytest.TempPathFactory) -> list[Identity]:
    base: Path = tmp_path_factory.mktemp("identities")
    return [load_or_create(base / str(number)) for number in range(6)]


@pytest.fixture(scope="session")
def alice(identities: list[Identity]) -> Identity:
    return identities[0]


@pytest.fixture(scope="session")
def bob(identities: list[Identity]) -> Identity:
    return identities[1]


@pytest.fixture(scope="session")
def carol(identities: list[Identity]) -> Identity:
    return identities[2]


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with dialling_session() as session:
        yield session
