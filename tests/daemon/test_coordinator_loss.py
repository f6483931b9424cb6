"""Real devices: the one that a model was started on is killed; the others go on, and so do answers with a key."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import sizes_of
from tests.clients import PATH, body, clients
from tests.household import Device, household

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
NAMES = ("laptop", "mini-pc", "jetson")
SLOTS, CONTEXT = 2, 512
TOKENS = 300
FIRST_TOKENS = 20
ANSWER_S = 10.0  # another device answers within this
SETTLE_S = 12.0  # in which a device that is back would be taken in
REQUESTS: tuple[dict[str, Any], ...] = (
    body("Tell me a story about a fox.", TOKENS, stream=True, logprobs=True, top_logprobs=3),
    body("Tell me a story.", TOKENS, stream=True, temperature=0.9, seed=3, frequency_penalty=0.4),
)


def memory() -> list[int]:
    """The first device has room for the ends and two blocks; the others for those and half of the blocks, and more."""
    sizes = sizes_of(MODEL_DIR, SLOTS, CONTEXT)
    ends, block = sizes.embedding + sizes.head, max(sizes.blocks)
    spare = block // 2
    rest = (sum(sizes.blocks) + ends) // 2 + spare
    first = sizes.working + ends + sum(sizes.blocks) - rest - block
    return [first, sizes.working + rest, sizes.working + rest]


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    lent = dict(zip(NAMES, map(str, memory()), strict=True))
    with household(tmp_path_factory.mktemp("loss"), NAMES, memory=lent) as made:
        online = ["online"] * len(NAMES)
        wait("all together", lambda: all([one["state"] for one in d.status()["devices"]] == online for d in made))
        made[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
        yield made
        for device in made:
            device.kill()  # a farewell would wait for those that cannot do without it


def deployments(device: Device) -> list[dict[str, Any]]:
    return list(device.status()["deployments"])


async def streamed(
    device: Device,
    request: dict[str, Any],
    key: str = "",
    last: str = "",
    until: int | None = None,
    begun: asyncio.Event | None = None,
    chances: list[float] | None = None,
) -> tuple[list[int], str]:
    """Token ids, and the last event's id; up to `until` ids. `begun` is set when FIRST_TOKENS are there.

    `chances` gets the log probabilities that are told.
    """
    ids, seen = list[int](), last
    headers = ({"Idempotency-Key": key} if key else {}) | ({"Last-Event-ID": last} if last else {})
    async with (
        clients(device.url, device.token()) as session,
        session.post(PATH, json=request, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        async for raw in response.content:
            line = raw.decode().strip()
            if line.startswith("id: "):
                seen = line[4:]
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    ids += choice.get("token_ids", [])
                    if chances is not None and choice["logprobs"]:
                        chances += [one["logprob"] for one in choice["logprobs"]["content"]]
            if until is not None and len(ids) >= until:
                break
            if begun is not None and len(ids) >= FIRST_TOKENS:
                begun.set()
    return ids, seen


def wait(what: str, condition: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.1)


def test_the_coordinator_of_three_is_killed(devices: list[Device]) -> None:
    first, second, third = devices
    (before,) = deployments(third)
    assert {one["device"] for one in before["plan"]["stages"]} == set(NAMES)
    asyncio.run(_killed(first, second, third))


async def _killed(first: Device, second: Device, third: Device) -> None:
    known, seen = list[float](), list[float]()
    undisturbed = [(await streamed(third, request, chances=known))[0] for request in REQUESTS]
    assert len(known) > TOKENS // 2  # tokens that end an answer have none
    wait("two followers", lambda: all("can follow" in one.log_tail() for one in (second, third)))
    with_key, without = REQUESTS
    flowing = asyncio.Event()
    reading = asyncio.create_task(streamed(third, without, begun=flowing))
    await flowing.wait()
    had, last = await streamed(third, with_key, "key", until=FIRST_TOKENS, chances=seen)
    assert not reading.done()
    first.kill()
    killed = time.monotonic()
    await streamed(third, body("Hello", 3, stream=True))
    assert time.monotonic() - killed < ANSWER_S
    for device in (third, second):
        rest, _ = await streamed(device, with_key, "key", last, chances=(told := list[float]()))
        assert had + rest == undisturbed[0]
        assert seen + told == pytest.approx(known, abs=1e-3)
    assert (await reading)[0] == undisturbed[1], "a stream that was read on another device went on"


def test_its_return_changes_no_coordinator_and_at_most_one_plan(devices: list[Device]) -> None:
    first, second, third = devices
    if first.process.poll() is None:  # type: ignore[union-attr]
        pytest.skip("the coordinator was not killed")
    (before,) = deployments(third)
    assert before["coordinator"] in (second.name, third.name)
    first.start().wait_ready()
    wait("it is back", lambda: all(one["state"] == "online" for one in third.status()["devices"]))
    ids, _ = asyncio.run(streamed(first, body("Hello", 3, stream=True)))
    assert len(ids) == 3
    epochs = set()
    until = time.monotonic() + SETTLE_S
    while time.monotonic() < until:
        (now,) = deployments(first)
        assert now["id"] == before["id"]
        assert now["coordinator"] == before["coordinator"]
        epochs.add(now["epoch"])
    assert len(epochs - {before["epoch"]}) <= 1, epochs
