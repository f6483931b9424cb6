"""Each of three devices answers for the model that one of them is the source of."""

from __future__ import annotations

import asyncio
import json
import secrets
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from peerllm.transport.identity import load_or_create
from tests.clients import clients, stream
from tests.e2e.test_openai_client import CANCEL_TIMEOUT_S, slots_in_use
from tests.household import Device

STORY = "Tell me a story."
TOLD_S = 10.0  # seconds until all devices know what one of them does


def said(device: Device, **more: Any) -> Any:
    messages = [{"role": "user", "content": STORY}]
    body = {"model": "builtin", "messages": messages, "max_tokens": 40, "temperature": 0, "return_token_ids": True}
    return device.post("/v1/chat/completions", body | more)["choices"][0]


def test_each_lists_the_same_models(demo: list[Device]) -> None:
    deadline = time.monotonic() + TOLD_S
    while (lists := [device.get("/v1/models") for device in demo]) != [lists[0]] * 3:
        assert time.monotonic() < deadline, f"the devices list different models: {lists}"
    found = [(one["id"], one["state"]) for one in lists[0]["data"]]
    assert found[0] == ("builtin", "serving") and all(state == "idle" for _, state in found[1:])


def test_each_gives_the_same_answer(demo: list[Device]) -> None:
    first, *others = (said(device) for device in demo)
    assert len(first["token_ids"]) == 40 and others == [first, first]
    drawn, *others = (said(device, temperature=1, seed=5, frequency_penalty=0.5) for device in demo)
    assert others == [drawn, drawn] and drawn != first


async def test_all_stream_at_once(demo: list[Device]) -> None:
    async def ask(device: Device) -> list[int]:
        async with clients(device.url, device.token()) as session:
            heard = await stream(session, STORY, 40)
        assert heard.done and heard.finish == "length"
        return heard.ids

    first, *others = await asyncio.gather(*(ask(device) for device in demo))
    assert len(first) == 40 and others == [first, first]


def test_chat_on_a_device_that_is_not_the_source(demo: list[Device]) -> None:
    lines = {device.cli("chat", STORY, "--max-tokens", "24", "--temperature", "0").stdout for device in demo}
    assert len(lines) == 1 and lines != {"\n"}


async def test_hanging_up_at_another_device_cancels_everywhere(demo: list[Device]) -> None:
    async with clients(demo[2].url, demo[2].token()) as session:
        await stream(session, STORY, 900, hang_up_after=5)
    deadline = time.monotonic() + CANCEL_TIMEOUT_S
    while (used := await asyncio.to_thread(slots_in_use, demo)) != [0, 0, 0]:
        assert time.monotonic() < deadline, f"slots still in use: {used}"


@pytest.mark.parametrize("body", [{"model": "nothing"}, {"model": "builtin", "n": 17}, {"model": "builtin"}])
def test_each_refuses_alike(demo: list[Device], body: dict[str, Any]) -> None:
    found = []
    for device in demo:
        with pytest.raises(urllib.error.HTTPError) as caught:
            device.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 9000}], **body})
        found.append((caught.value.code, json.load(caught.value)))
    assert found == [found[0]] * 3


def control_port(device: Device) -> int:
    status = device.status()
    (port,) = (one["address"].rpartition(":")[2] for one in status["devices"] if one["name"] == device.name)
    return int(port)


def test_who_is_not_paired_reaches_no_answer(demo: list[Device]) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    url = f"https://127.0.0.1:{control_port(demo[0])}/api/answer"
    with pytest.raises((urllib.error.URLError, ConnectionError, ssl.SSLError)):
        urllib.request.urlopen(urllib.request.Request(url, b"{}", method="POST"), context=context, timeout=30)


ALLOWED = {
    "/api/answer": "400",
    "/api/peerllm/v1/stop": "404",
    "/api/v1/models": "404",
    "/api/../peerllm/v1/leave": "404",
    "/peerllm/v1/leave": "404",
}


def test_a_paired_device_reaches_answers_only(demo: list[Device]) -> None:
    """As the mini PC, with its own key: chat is answered, nothing that changes the household is."""
    mini = load_or_create(demo[1].data_dir)
    identity = ["--cert", str(mini.certificate_path), "--key", str(mini.key_path)]
    curl = ["curl", "-sk", "--path-as-is", *identity, "-o", "/dev/null", "-w", "%{http_code}", "-d", "{}"]
    base = f"https://127.0.0.1:{control_port(demo[0])}"
    for path, wanted in ALLOWED.items():
        done = subprocess.run([*curl, base + path], capture_output=True, text=True, timeout=30, check=False)
        assert done.stdout == wanted, path
    assert demo[0].get("/v1/models")["data"][0]["state"] == "serving"


async def test_an_answer_goes_on_at_another_device(demo: list[Device]) -> None:
    """Begun at one device that is not the source, its client hangs up and goes on at the other."""
    key = {"Idempotency-Key": secrets.token_hex(8)}
    body = {"model": "builtin", "messages": [{"role": "user", "content": STORY}], "max_tokens": 60, "stream": True,
            "temperature": 1, "return_token_ids": True}  # fmt: skip
    ids: list[int] = []
    last = ""

    async def hear(device: Device, headers: dict[str, str], most: int) -> None:
        nonlocal last
        async with (
            clients(device.url, device.token()) as session,
            session.post("/v1/chat/completions", json=body, headers=headers) as response,
        ):
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"id: "):
                    last = line[4:].decode().strip()
                elif line.startswith(b"data: {"):
                    ids.extend(json.loads(line[6:])["choices"][0]["token_ids"])
                    if len(ids) >= most:
                        return

    await hear(demo[1], key, 5)
    await hear(demo[2], {**key, "Last-Event-ID": last}, 1000)
    async with (
        clients(demo[0].url, demo[0].token()) as session,
        session.post("/v1/chat/completions", json={**body, "stream": False}, headers=key) as response,
    ):
        assert (await response.json())["choices"][0]["token_ids"] == ids
    assert last == "end" and len(ids) <= 60
