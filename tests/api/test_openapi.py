"""The OpenAPI document: every route is in it, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from peerllm.api.routes.api_document import openapi
from peerllm.api.server import create_app
from tests.api.fake import FakeHousehold

TOKEN = "correct-horse-battery-staple"


@pytest.fixture
def app(tmp_path: Path) -> web.Application:
    return create_app(FakeHousehold(tmp_path), TOKEN, loopback=True, in_process=True)


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method.upper(), path): one for path, some in document["paths"].items() for method, one in some.items()}


def test_every_registered_route_is_described_and_every_described_one_registered(app: web.Application) -> None:
    registered = {(one.method, one.resource.canonical) for one in app.router.routes() if one.resource is not None}
    assert set(operations(openapi(app))) == registered


def test_every_operation_says_what_it_does_under_a_name_of_its_own(app: web.Application) -> None:
    found = operations(openapi(app))
    assert not [key for key, one in found.items() if not one.get("summary")]
    assert not [name for name, count in Counter(one["operationId"] for one in found.values()).items() if count > 1]


async def test_the_document_is_served(client: aiohttp.ClientSession, app: web.Application) -> None:
    async with client.get("/openapi.json") as response:
        assert response.content_type == "application/json"
        document = await response.json()
    assert document == openapi(app)


def test_beyond_loopback_every_operation_needs_the_token(app: web.Application, tmp_path: Path) -> None:
    open_app = create_app(FakeHousehold(tmp_path), TOKEN, loopback=False, in_process=True)
    needs = [{"bearer": []}, {"key": []}]
    assert all(one["security"] == needs for one in operations(openapi(open_app)).values())
    at_home = {key: one["security"] for key, one in operations(openapi(app)).items()}
    changes = {key for key in at_home if key[0] == "POST" and key[1].startswith("/peerllm/")}
    assert all((found == needs) is (key in changes) for key, found in at_home.items())
