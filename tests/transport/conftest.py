"""Identities to pair and links to break. Keys are made once: who they belong to is what the tests are about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from peerllm.transport.dial import dialling_session
from peerllm.transport.identity import Identity, load_or_create
from peerllm.transport.links.data_plane import DataPlane
from peerllm.transport.links.link import Link
from tests.transport.planes import Node


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


@pytest.fixture
async def nodes(alice: Identity, bob: Identity, carol: Identity) -> AsyncIterator[list[Node]]:
    nodes = []
    for identity in (alice, bob, carol):
        heard: list[Node] = []

        def lost(link: Link, heard: list[Node] = heard) -> None:
            heard[0].lost.put_nowait((link.deployment, link.device, link.lost))

        node = Node(identity, DataPlane(identity, ["127.0.0.1"], 0, lost))
        heard.append(node)
        await node.plane.start()
        await node.plane.set_trusted([i.certificate_pem for i in (alice, bob, carol) if i is not identity])
        nodes.append(node)
    yield nodes
    for node in nodes:
        await node.plane.close()
        await node.plane.close()
        assert node.plane.poller is None or node.plane.poller._released, "its descriptors were given back"
    left = {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(("link ", "dial "))}
    assert left == set(), "tasks were left behind"
