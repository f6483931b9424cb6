"""An answer of another device: passed on unchanged, cancelled with its client, refused where it must not go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from peerllm.api import peer_api
from peerllm.api.core import asking, model_wait, remote_answer, telling
from peerllm.api.core.kept import answer_store
from peerllm.api.keys import ANSWERS
from peerllm.api.server import ApiServer
from peerllm.daemon.decide.fair_queue import MAX_QUEUED
from peerllm.daemon.facade import InheritedAnswer, RelayedAnswer
from peerllm.errors import EngineError, OverloadedError
from peerllm.transport.tls.tls_server import MAX_REQUESTS_PER_DEVICE
from tests.api.fake import BOUND_S
from tests.api.relay_pair import ASK, LAPTOP, MINI, PATH, Pair

BEGINS = b'{"type":"begins","id":"0","created":1,"model":"builtin","prompt_tokens":3}\n'
HI = b'{"type":"text","text":"Hi","ids":[7],"tokens":1}\n'


def relayed(**more: Any) -> dict[str, Any]:
    """What another device sends for one of its clients."""
    return {"generation": ASK, "client": "127.0.0.1", "key": "k", **more}


async def test_an_answer_is_the_sources_own(pair: Pair) -> None:
    async with pair.session.post(PATH, json=ASK) as response:
        answer = await response.json()
    assert (response.status, answer["choices"][0]["message"]["content"]) == (200, pair.laptop.reply)
    async with pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        text = await response.text()
    assert response.content_type == "text/event-stream"
    events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert said == pair.laptop.reply and text.endswith("data: [DONE]\n\n")
    assert not pair.mini.requests


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/completions", {"prompt": "hi", "max_tokens": 99}), ("/api/chat", {"messages": ASK["messages"]}),
    ("/api/generate", {"prompt": "hi"}), ("/v1/messages", {"messages": ASK["messages"], "max_tokens": 99}),
])  # fmt: skip
async def test_every_api_relays(pair: Pair, path: str, body: dict[str, Any]) -> None:
    """Whole and streamed, and the source's refusal in the words of the API."""
    for stream in (False, True):
        async with pair.session.post(path, json={"model": "builtin", **body, "stream": stream}) as response:
            text = await response.text()
            assert response.status == 200, text
        if stream:
            objects = [json.loads(one.removeprefix("data: ")) for one in text.split("\n") if "{" in one]
        said = "".join(str(_text(one)) for one in (objects if stream else [json.loads(text)]))
        assert said == pair.laptop.reply
    pair.laptop.error_at_once = OverloadedError("the queue is full", 2.3)
    async with pair.session.post(path, json={"model": "builtin", **body}) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "3")
        error = (await response.json())["error"]
    assert (error if path.startswith("/api/") else error["message"]) == "the queue is full"
    assert not pair.mini.requests


def _text(told: Any) -> str:
    """Of an object of any API."""
    for name in ("text", "response"):
        if isinstance(told, dict) and isinstance(told.get(name), str):
            return str(told[name])
    inner = [told[name] for name in ("choices", "message", "content", "delta") if told.get(name)]
    if inner and isinstance(inner[0], str):
        return inner[0]
    return "".join(_text(one) for part in inner[:1] for one in (part if isinstance(part, list) else [part]))


async def test_tokens_come_one_by_one(pair: Pair) -> None:
    pair.laptop.endless, pair.laptop.pace_s = True, 0.01
    async with pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        async with asyncio.timeout(BOUND_S):
            for _ in range(5):
                assert (await response.content.readuntil(b"\n\n")).startswith(b"data: ")
    assert pair.laptop.produced < 200, "the answer was not awaited whole"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_at_the_source(pair: Pair, stream: bool) -> None:
    pair.laptop.gate = asyncio.Event()
    task = asyncio.create_task(pair.session.post(PATH, json={**ASK, "stream": stream}))
    await asyncio.wait_for(pair.laptop.asked.wait(), BOUND_S)
    task.cancel()
    await asyncio.wait_for(pair.laptop.closed.wait(), BOUND_S)


@pytest.mark.parametrize("stream", [True, False])
async def test_refusals_keep_status_headers_and_words(pair: Pair, stream: bool) -> None:
    pair.laptop.error_at_once = OverloadedError("the queue is full: 64 requests wait", 2.3)
    async with pair.session.post(PATH, json={**ASK, "stream": stream}) as response:
        error = (await response.json())["error"]
    assert (response.status, response.headers["Retry-After"]) == (429, "3")
    assert error["message"] == "the queue is full: 64 requests wait"


async def test_an_error_midway_comes_through_as_it_was(pair: Pair) -> None:
    pair.laptop.error_midway = EngineError("the engine on jetson died: out of memory")
    async with pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        events = (await response.text()).removesuffix("\n\n").split("\n\n")
    assert "out of memory" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
    assert not any("[DONE]" in event for event in events)


async def test_a_source_that_dies_midway_ends_the_stream_with_an_error(pair: Pair) -> None:
    pair.laptop.endless, pair.laptop.pace_s = True, 0.01
    async with pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        closing = asyncio.create_task(pair.server.close())
        events = (await response.text()).removesuffix("\n\n").split("\n\n")
        await closing
    assert "error" in json.loads(events[-1].removeprefix("data: "))
    assert not any("[DONE]" in event for event in events)


class Torn:
    """A control port that sends what it is told, then cuts the connection."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in self.parts:
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
        await writer.drain()
        if self.parts[-1].endswith((b"end", b"\n")):
            writer.write(b"0\r\n\r\n")
        elif not self.parts[-1].endswith(b"stay"):
            writer.close()

    async def start(self) -> tuple[asyncio.Server, str]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("rest", [b'{"type":"te', b'{"type":"the end', HI, b"nonsense\n", b'{"type":"other"}\n'])
async def test_a_stream_that_broke_off_ends_with_an_error(
    pair: Pair, rest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torn, brought to an orderly end before its last event, or without sense."""
    monkeypatch.setattr(asking, "RESUME_S", 0.0)
    server, pair.mini.peers[LAPTOP] = await Torn(BEGINS, rest).start()
    async with server, pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        events = (await response.text()).removesuffix("\n\n").split("\n\n")
    assert '"role":"assistant"' in events[0]
    assert [json.loads(one[6:])["choices"][0]["delta"]["content"] for one in events[1:-1]] == ["Hi"] * (rest == HI)
    assert json.loads(events[-1].removeprefix("data: "))["error"]["status"] == 503


async def test_an_event_without_an_end_is_bounded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_answer, "MAX_EVENT_BYTES", 100)
    monkeypatch.setattr(asking, "RESUME_S", 0.0)
    server, pair.mini.peers[LAPTOP] = await Torn(BEGINS, b"x" * 200, b"stay").start()
    async with server, pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        assert "without an end" in await asyncio.wait_for(response.text(), BOUND_S)


IDS = b'{"type":"text","text":"","ids":[' + b",".join([b"7"] * 400) + b'],"tokens":400}\n'
CALL = b'{"type":"call","index":0,"id":"1","name":"f","ids":[],"tokens":1}\n'
NAMED = CALL.replace(b'"f"', b'"' + b"f" * 400 + b'"')


@pytest.mark.parametrize("piece", [IDS, NAMED, HI, CALL])
async def test_an_answer_without_an_end_is_bounded(pair: Pair, piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is made of, whole and as a stream: else a source takes all memory of who asks."""
    monkeypatch.setattr(asking, "RESUME_S", 0.0)
    monkeypatch.setattr(telling, "MAX_WHOLE_CHARS", 8000)
    for stream in (False, True):
        if stream:
            monkeypatch.setattr(remote_answer, "MAX_ANSWER_BYTES", 8000)
        server, pair.mini.peers[LAPTOP] = await Torn(BEGINS, piece * 1000, b"stay").start()
        async with server, pair.session.post(PATH, json={**ASK, "stream": stream}) as response:
            assert "the answer has more than 8000" in await asyncio.wait_for(response.text(), BOUND_S)


async def test_arguments_of_no_call(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "RESUME_S", 0.0)
    for index in (1, -1):
        told = b'{"type":"arguments","index":%d,"arguments":"{","ids":[],"tokens":1}\n' % index
        server, pair.mini.peers[LAPTOP] = await Torn(BEGINS, CALL, told, b"stay").start()
        async with server, pair.session.post(PATH, json=ASK) as response:
            error = await asyncio.wait_for(response.json(), BOUND_S)
            assert (response.status, "never began" in error["error"]["message"]) == (503, True)


async def test_an_event_in_small_pieces_is_looked_at_once() -> None:
    """Else a source that sends bytes one by one keeps this device busy for the square of their number."""
    looked, lines = 0, []

    class Counted(bytearray):
        def rfind(self, what: Any, start: Any = 0) -> int:  # type: ignore[override]
            nonlocal looked
            looked += len(self) - start
            return super().rfind(what, start)

    async def pieces() -> AsyncIterator[bytes]:
        for byte in b"x" * 3000 + b"\nend\n":
            yield bytes([byte])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_answer, "bytearray", Counted, raising=False)
        here: Any = remote_answer.RemoteAnswer(*[None] * 5)  # type: ignore[arg-type]
        async for line in here._lines(RelayedAnswer(200, {}, pieces())):
            lines.append(line)
    assert lines == [b"x" * 3000, b"end"]
    assert looked == 3005


async def test_a_large_answer_in_one_piece_is_bounded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "MAX_WHOLE_CHARS", 10)
    async with pair.session.post(PATH, json=ASK) as response:
        assert response.status == 503 and "more than 10 characters" in (await response.json())["error"]["message"]


async def test_a_refusal_without_an_end_is_bounded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_answer, "MAX_REFUSAL_BYTES", 100)
    monkeypatch.setattr(asking, "SOUGHT_S", 0.0)
    pair.laptop.error_at_once = OverloadedError("x" * 200)
    async with pair.session.post(PATH, json=ASK) as response:
        assert response.status == 503 and "larger than 100 bytes" in (await response.json())["error"]["message"]


async def test_a_silent_source_keeps_the_client_connected(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_answer, "SILENCE_S", 0.02)
    monkeypatch.setattr(asking, "RESUME_S", 0.0)
    server, pair.mini.peers[LAPTOP] = await Torn(BEGINS, b"stay").start()
    async with server, pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        assert b'"role":"assistant"' in await response.content.readuntil(b"\n\n")
        for _ in range(remote_answer.MAX_SILENCES - remote_answer.USUAL_SILENCES):
            assert await response.content.readuntil(b"\n\n") == b": nothing is heard of the device of builtin\n\n"
        assert b"said nothing" in await response.read(), "but not for ever"


async def test_a_source_of_which_nothing_is_heard_is_named_at_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_answer, "SILENCE_S", 0.02)
    monkeypatch.setattr(remote_answer, "USUAL_SILENCES", 10_000)
    monkeypatch.setattr(remote_answer, "MAX_SILENCES", 10_000)
    server, pair.mini.peers[LAPTOP] = await Torn(BEGINS, b"stay").start()
    pair.mini.devices[1].update(id=LAPTOP, name="laptop", state="online")
    async with server, pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        assert b'"role":"assistant"' in await response.content.readuntil(b"\n\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readuntil(b"\n\n"), 0.1)
        pair.mini.devices[1]["state"] = "silent"
        async with asyncio.timeout(BOUND_S):
            assert await response.content.readuntil(b"\n\n") == b": nothing is heard of laptop\n\n"


async def test_a_source_that_cannot_be_reached_is_503(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "SOUGHT_S", 0.0)
    pair.mini.peers.clear()
    async with pair.session.post(PATH, json=ASK) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "5")


async def test_an_answer_of_which_nothing_has_come_is_sought_again_without_a_key(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "RETRY_S", 0.0)
    peers, tries = dict(pair.mini.peers), 0
    relay = pair.mini.relay

    def lost_once(*asked: Any) -> Any:
        nonlocal tries
        tries += 1
        pair.mini.peers = {} if tries == 1 else peers
        return relay(*asked)

    monkeypatch.setattr(pair.mini, "relay", lost_once)
    async with pair.session.post(PATH, json=ASK) as response:
        assert (response.status, tries) == (200, 2)


async def test_the_source_waits_and_its_progress_comes_through(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.laptop.served = [replace(pair.laptop.model, state="loading", message="loading", progress=0.43)]
    pair.mini.served = [pair.elsewhere()]
    async with pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        assert await response.content.readuntil(b"\n\n") == b": loading (43%)\n\n"
        pair.laptop.served = [pair.laptop.model]
        pair.laptop.touch()
        assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_a_refusal_after_comments_is_the_last_event(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """This device had said that it waits, before the model turned out to be another's, which refuses."""
    monkeypatch.setattr(model_wait, "PROGRESS_S", 0.01)
    pair.laptop.error_at_once = OverloadedError("the queue is full", 2.0)
    pair.mini.served = [replace(pair.mini.model, state="planning", message="looking")]
    async with pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        assert (await response.content.readuntil(b"\n\n")).startswith(b": looking")
        pair.mini.served = [pair.elsewhere()]
        pair.mini.touch()
        last = (await response.text()).removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the queue is full"


async def test_a_relayed_request_is_never_relayed_again(pair: Pair) -> None:
    """Each believes that the other is the source."""
    pair.laptop.served = [replace(pair.elsewhere(), source=MINI)]
    async with pair.mini.control_port() as back:
        pair.laptop.peers = {MINI: back}
        async with pair.session.post(PATH, json=ASK) as response:
            assert response.status == 404
    assert not pair.mini.requests and not pair.laptop.requests


async def test_who_asks_a_device_that_another_serves_it_instead_of_is_told_so(pair: Pair) -> None:
    """As where two devices began to start a model, and the one that was asked gave way."""
    pair.laptop.served = [replace(pair.elsewhere(), source="c" * 64)]
    headers = {"X-Device": MINI}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(pair.control + remote_answer.ANSWER_PATH, json=relayed()) as response,
    ):
        assert (response.status, (await response.json())["error"]["code"]) == (503, "device_leaving")


async def test_peers_reach_answers_only(pair: Pair) -> None:
    headers = {"X-Device": MINI, "X-PeerLLM": "page"}
    path = remote_answer.ANSWER_PATH
    async with aiohttp.ClientSession(headers=headers) as session:
        for other in ("/peerllm/v1/stop", "/peerllm/v1/run", "/peerllm/v1/status", "/v1/models", "/", "//answer", PATH,
                      "/answer/../peerllm/v1/stop", "/answer%2fx"):  # fmt: skip
            async with session.post(pair.control + other, json=relayed()) as response:
                assert response.status == 404, other
        async with session.get(pair.control + path) as response:
            assert response.status == 404
        async with session.post(pair.control + path, data=b"x" * (9 << 20)) as response:
            assert response.status == 413
        async with session.post(pair.control + path, data=chunked(b" " * (1 << 20), 9)) as response:
            assert response.status == 413, "also where no length was told"
        for wrong in (b"{", b"{}", json.dumps(relayed(key="")).encode(), json.dumps(relayed(had=-1)).encode(),
                      json.dumps(relayed(generation={**ASK, "sampling": {"top_p": 2}})).encode(),
                      json.dumps(relayed(generation={**ASK, "keep_alive_s": 1e300})).encode()):  # fmt: skip
            async with session.post(pair.control + path, data=wrong) as response:
                assert response.status == 400, wrong
    assert not pair.laptop.calls and not pair.laptop.runs


async def chunked(piece: bytes, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield piece


async def test_one_device_cannot_take_all_streams(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_api, "MAX_OF_DEVICE", 1)
    pair.laptop.gate = asyncio.Event()
    first = asyncio.create_task(pair.session.post(PATH, json=ASK))
    await asyncio.wait_for(pair.laptop.asked.wait(), BOUND_S)
    async with pair.session.post(PATH, json=ASK) as response:
        assert response.status == 429 and response.headers["Retry-After"]
    pair.laptop.gate.set()
    assert (await first).status == 200
    async with pair.session.post(PATH, json=ASK) as response:
        assert response.status == 200


async def test_two_hundred_at_once_are_within_every_bound(pair: Pair) -> None:
    pair.laptop.gate = asyncio.Event()
    async with aiohttp.ClientSession(pair.here, connector=aiohttp.TCPConnector(limit=0)) as session:
        asked = [asyncio.create_task(session.post(PATH, json=ASK)) for _ in range(200)]
        async with asyncio.timeout(6 * BOUND_S):
            while len(pair.laptop.requests) < len(asked):
                pair.laptop.asked.clear()
                await pair.laptop.asked.wait()
        pair.laptop.gate.set()
        assert [(await one).status for one in asked] == [200] * 200
    assert MAX_REQUESTS_PER_DEVICE > peer_api.MAX_OF_DEVICE >= MAX_QUEUED // 2 >= 200


async def test_large_bodies_of_one_device_are_bounded_together(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerllm.api.tasks.MAX_BYTES", 9 << 20)
    pair.laptop.gate = asyncio.Event()
    headers, large = {"X-Device": MINI}, relayed(metadata={"x": "x" * (5 << 20)})
    async with aiohttp.ClientSession(pair.control, headers=headers) as session:
        first = asyncio.create_task(session.post(remote_answer.ANSWER_PATH, json=large))
        await asyncio.wait_for(pair.laptop.asked.wait(), BOUND_S)
        async with session.post(remote_answer.ANSWER_PATH, json={**large, "key": "l"}) as response:
            assert response.status == 429 and response.headers["Retry-After"]
        pair.laptop.gate.set()
        assert (await first).status == 200
        async with session.post(remote_answer.ANSWER_PATH, json={**large, "key": "l"}) as response:
            assert response.status == 200


async def test_large_bodies_of_one_client_are_bounded_together_before_they_are_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerllm.api.tasks.MAX_BYTES", 9 << 20)
    pair.laptop.gate = asyncio.Event()
    large = {**ASK, "metadata": {"x": "x" * (5 << 20)}}
    async with aiohttp.ClientSession(pair.server.url) as local:
        first = asyncio.create_task(local.post(PATH, json=large))
        await asyncio.wait_for(pair.laptop.asked.wait(), BOUND_S)
        async with local.post(PATH, json={**large, "user": "another"}) as response:
            assert response.status == 429 and "large requests of yours" in (await response.json())["error"]["message"]
        async with local.post(PATH, json={**ASK, "stream": "no"}) as response:
            assert response.status == 400, "small ones pass"
        async with pair.session.post(PATH, json={**ASK, "stream": "no"}) as response:
            assert response.status == 400
        pair.laptop.gate.set()
        assert (await first).status == 200


async def test_kept_answers_of_a_device_share_its_bound(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_store, "MAX_KEPT_OF_CLIENT", 2)
    for user in ("u", "v", "w", "u"):
        key = {"Idempotency-Key": f"key of {user}"}
        async with pair.session.post(PATH, json={**ASK, "user": user}, headers=key) as response:
            assert response.status == 200
    assert len(pair.laptop.requests) == 4, "the first made way for the third"


async def test_a_device_cannot_speak_for_clients_of_another(pair: Pair) -> None:
    async with aiohttp.ClientSession(pair.server.url) as local, local.post(PATH, json=ASK) as response:
        await response.read()
    async with pair.session.post(PATH, json={**ASK, "user": "u"}) as response:
        await response.read()
    async with (
        aiohttp.ClientSession(pair.control, headers={"X-Device": MINI}) as session,
        session.post(remote_answer.ANSWER_PATH, json=relayed(client="x" * 999)) as response,
    ):
        assert response.status == 400
    local_, other = (request.client for request in pair.laptop.requests)
    assert local_ == "127.0.0.1/"
    assert other == f"device:{MINI}/127.0.0.1/u"


async def test_every_device_lists_every_model(pair: Pair) -> None:
    async def listed(url: str) -> Any:
        async with aiohttp.ClientSession(url) as session, session.get("/v1/models") as response:
            return await response.json()

    own = replace(pair.mini.model, name="mine", model="/models/mine", deployment="e" * 32, created=5)
    pair.mini.served = [own, pair.elsewhere()]
    pair.laptop.served = [pair.laptop.model, replace(own, source=MINI)]
    first, second = await listed(pair.server.url), await listed(pair.here)
    assert first == second and [one["id"] for one in first["data"]] == ["mine", "builtin"]


async def test_of_two_models_of_one_name_the_one_that_serves_then_the_own(pair: Pair) -> None:
    own = replace(pair.mini.model, deployment="e" * 32)
    pair.mini.served = [own, pair.elsewhere()]
    async with pair.session.post(PATH, json=ASK) as response:
        await response.read()
    assert len(pair.mini.requests) == 1
    pair.mini.served = [replace(own, state="failed"), pair.elsewhere()]
    async with pair.session.post(PATH, json=ASK) as response:
        await response.read()
    assert len(pair.laptop.requests) == 1


async def test_shutting_down_ends_a_relayed_stream_with_an_error(pair: Pair, tmp_path: Path) -> None:
    pair.laptop.endless, pair.laptop.pace_s = True, 0.01
    second = ApiServer(pair.mini, "127.0.0.1", 0, tmp_path / "again", in_process=True)
    await second.start()
    async with aiohttp.ClientSession(second.url) as session, session.post(PATH, json={**ASK, "stream": True}) as answer:
        await answer.content.readuntil(b"\n\n")
        await second.close()
        assert "shutting down" in await answer.text()
    await asyncio.wait_for(pair.laptop.closed.wait(), BOUND_S)


KEY = {"Idempotency-Key": "7c0d2b1e"}


async def test_an_answer_with_a_key_is_found_through_any_device(pair: Pair) -> None:
    async with aiohttp.ClientSession(pair.server.url) as local, local.post(PATH, json=ASK, headers=KEY) as response:
        first = await response.json()
    async with pair.session.post(PATH, json=ASK, headers=KEY) as response:
        assert await response.json() == first
    last = {**KEY, "Last-Event-ID": "5"}
    async with pair.session.post(PATH, json={**ASK, "stream": True}, headers=last) as response:
        assert b'{"content":", w' in await response.content.readuntil(b"\n\n")
    async with pair.session.post(PATH, json={**ASK, "max_tokens": 3}, headers=KEY) as response:
        assert response.status == 422
    assert len(pair.laptop.requests) == 1


async def test_a_stream_with_a_key_goes_on_after_its_link_broke(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    pair.laptop.middle = asyncio.Event()
    async with (
        pair.laptop.control_port() as again,
        pair.session.post(PATH, json={**ASK, "stream": True}, headers=KEY) as response,
    ):
        heard = b""
        async with asyncio.timeout(BOUND_S):
            while b"id: 4\n" not in heard:
                heard += await response.content.readuntil(b"\n\n")
            pair.mini.peers.clear()
            await pair.cut()
            while b": the device of builtin is lost" not in heard:
                heard += await response.content.readuntil(b"\n\n")
        pair.mini.peers[LAPTOP] = again
        pair.laptop.middle.set()
        heard += await response.read()
    events = [json.loads(line[6:]) for line in heard.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == pair.laptop.reply
    assert len({event["id"] for event in events}) == 1 and heard.endswith(b"data: [DONE]\n\n")
    assert len(pair.laptop.requests) == 1


async def test_a_source_that_shuts_down_is_sought_elsewhere(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are not the end for an answer with a key; nobody has it here, and the stream says so."""
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    pair.laptop.endless, pair.laptop.pace_s = True, 0.01
    async with pair.session.post(PATH, json={**ASK, "stream": True}, headers=KEY) as response:
        while b"id: 2\n" not in await response.content.readuntil(b"\n\n"):
            pass
        pair.mini.served = [pair.mini.model]
        closing = asyncio.create_task(pair.server.close())
        text = await asyncio.wait_for(response.text(), BOUND_S)
        await closing
    assert "shutting down" not in text and ": the device of builtin is lost" in text
    assert json.loads(text.removesuffix("\n\n").split("\n\n")[-1][6:])["error"]["status"] == 409


async def test_it_is_sought_for_a_bounded_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    monkeypatch.setattr(asking, "RESUME_S", 0.1)
    pair.mini.peers.clear()
    async with pair.session.post(PATH, json=ASK, headers=KEY) as response:
        assert response.status == 503
    async with pair.session.post(PATH, json={**ASK, "stream": True}, headers=KEY) as response:
        last = (await response.text()).removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["status"] == 503


async def test_a_stream_leaves_a_silent_device_once_another_answers(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mini PC itself takes the model over, where the answer is not kept: the stream ends with an honest error."""
    monkeypatch.setattr(remote_answer, "SILENCE_S", 0.02)
    monkeypatch.setattr(asking, "RETRY_S", 0.01)
    server, pair.mini.peers[LAPTOP] = await Torn(BEGINS + HI, b"stay").start()
    async with server, pair.session.post(PATH, json={**ASK, "stream": True}, headers=KEY) as response:
        assert (await response.content.readuntil(b"\n\n")).startswith(b"id: 0\n")
        assert (await response.content.readuntil(b"\n\n")).startswith(b"id: 1\n")
        pair.mini.served = [pair.mini.model]
        last = (await asyncio.wait_for(response.text(), BOUND_S)).removesuffix("\n\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["status"] == 409


async def test_an_answer_without_a_key_goes_on_on_the_device_that_follows(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_answer, "SILENCE_S", 0.05)
    pair.laptop.middle = asyncio.Event()
    async with asyncio.timeout(BOUND_S), pair.session.post(PATH, json={**ASK, "stream": True}) as response:
        text = b""
        while text.count(b"data: ") < 2:  # the role and a few tokens
            text += await response.content.readuntil(b"\n\n")
        asked = pair.laptop.requests[0]
        sampled = asked.prompt, asked.max_tokens, asked.sampling, asked.client, asked.kept
        pair.mini.inherit(InheritedAnswer(asked.deployment, *sampled, pair.laptop.ids(pair.laptop.reply)[:2]))
        pair.mini.served = [pair.mini.model]
        text += await response.content.read()
    assert text.endswith(b"data: [DONE]\n\n") and b"id: " not in text
    events = [json.loads(one.removeprefix(b"data: ")) for one in text.split(b"\n\n") if one.startswith(b"data: {")]
    assert not any("error" in event for event in events)
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert said == pair.laptop.reply and len({event["id"] for event in events}) == 1
    assert sum("role" in event["choices"][0]["delta"] for event in events) == 1, "it begins once"


async def test_relayed_answers_without_a_key_are_not_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_store, "MAX_KEPT_OF_CLIENT", 2)
    for _ in range(4):
        async with pair.session.post(PATH, json=ASK) as response:
            assert response.status == 200
    pair.laptop.gate = asyncio.Event()
    waiting = [asyncio.create_task(pair.session.post(PATH, json=ASK)) for _ in range(4)]
    while len(pair.laptop.requests) < 8:
        await asyncio.wait_for(pair.laptop.asked.wait(), BOUND_S)
        pair.laptop.asked.clear()
    waiting.append(asyncio.create_task(pair.session.post(PATH, json=ASK, headers={"Idempotency-Key": "mine"})))
    while len(pair.laptop.requests) < 9:  # they take no room from those with keys
        await asyncio.wait_for(pair.laptop.asked.wait(), BOUND_S)
        pair.laptop.asked.clear()
    pair.laptop.gate.set()
    assert {(await one).status for one in waiting} == {200}
    assert pair.server._runner is not None
    assert [*pair.server._runner.app[ANSWERS]._answers] == ["mine"]


async def test_a_device_that_relays_hears_that_its_answer_is_being_made(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would take a long answer in one piece, or one that waits, for a device that is stuck."""
    monkeypatch.setattr(peer_api, "STILL_HERE_S", 0.01)
    pair.laptop.gate, sign = asyncio.Event(), b'{"type":"waits","note":"working"}\n'
    async with (
        asyncio.timeout(BOUND_S),
        aiohttp.ClientSession(pair.control, headers={"X-Device": MINI}) as session,
        session.post(remote_answer.ANSWER_PATH, json=relayed()) as response,
    ):
        assert response.status == 200
        assert await response.content.readexactly(3 * len(sign)) == 3 * sign
        pair.laptop.gate.set()
        assert '"type":"ends"' in (await response.text()).splitlines()[-1]


async def test_a_refusal_after_signs_of_life_keeps_its_status(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_api, "STILL_HERE_S", 0.01)
    pair.laptop.gate, pair.laptop.finish = asyncio.Event(), "stop"
    pair.laptop.error_midway = OverloadedError("no room", 2.0)
    asking = asyncio.create_task(pair.session.post(PATH, json=ASK))
    await asyncio.wait_for(pair.laptop.asked.wait(), BOUND_S)
    asyncio.get_running_loop().call_later(0.05, pair.laptop.gate.set)
    async with await asking as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "5")
        assert (await response.json())["error"]["message"] == "no room"


async def test_one_who_asks_leaves_streams_to_the_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerllm.api.tasks.MAX_STREAMS", 4)
    pair.laptop.gate = asyncio.Event()
    tasks = []

    async def begin(session: aiohttp.ClientSession, user: str) -> None:
        pair.laptop.asked.clear()
        tasks.append(asyncio.create_task(session.post(PATH, json={**ASK, "user": user})))
        await asyncio.wait_for(pair.laptop.asked.wait(), BOUND_S)

    async with aiohttp.ClientSession(pair.server.url) as local:
        for user in "abc":
            await begin(local, user)
        async with local.post(PATH, json=ASK) as response:
            assert response.status == 429 and "3 of them to you" in (await response.json())["error"]["message"]
        await begin(pair.session, "d")
        pair.laptop.gate.set()
        assert [response.status for response in await asyncio.gather(*tasks)] == [200] * 4
