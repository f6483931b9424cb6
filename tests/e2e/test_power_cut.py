"""A household loses its power at once and comes back in any order: it serves again by itself, and says the same."""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from collections.abc import Iterator

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.household import Device, pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NAMES = ("laptop", "mini-pc", "jetson")
SLOTS, CONTEXT = 2, 512
PORTS = 3  # that each device listens on, one above the other
QUESTION = "What are you?"
SERVES_S = 90
ORDERS = list(itertools.permutations(range(len(NAMES))))
if not os.environ.get("PEERLLM_FULL"):
    ORDERS = [(0, 1, 2), (2, 1, 0)]  # the source first, and last


def free_ports(count: int) -> list[int]:
    """So many first ports, each with PORTS - 1 free ones above it; where a device was, it is looked for again."""
    chance, found = random.Random(), list[int]()
    while len(found) < count:
        base = chance.randrange(20000, 30000, PORTS)
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for offset, sock in enumerate((one, two, three)):
                    sock.bind(("127.0.0.1", base + offset))
            except OSError:
                continue
        if base not in found:
            found.append(base)
    return found


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    """Only all of them together hold the model."""
    root = tmp_path_factory.mktemp("power")
    memory = limits(sizes_of(MODEL_DIR, SLOTS, CONTEXT), len(NAMES))
    made = [
        Device(root / name, name, memory=str(lent), options=("--no-mdns", "--loopback"), port=port)
        for name, lent, port in zip(NAMES, memory, free_ports(len(NAMES)), strict=True)
    ]
    try:
        for one in made:
            one.start()
        for one in made:
            one.wait_ready()
        for one in made[1:]:
            pair(made[0], one)
        yield made
    finally:
        for one in made:
            one.stop()


@pytest.fixture(scope="module")
def served(devices: list[Device]) -> tuple[str, str]:
    """The deployment's id, and what it says."""
    devices[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
    return answer(devices[0])


def answer(source: Device) -> tuple[str, str]:
    """Asked once it serves, on three devices."""
    deadline = time.monotonic() + SERVES_S
    while (found := source.status()["deployments"]) and found[0]["state"] != "serving":
        assert time.monotonic() < deadline, f"{found[0]}\n{source.log_tail()}"
    assert {stage["device"] for stage in found[0]["plan"]["stages"]} == set(NAMES)
    said = source.cli("chat", QUESTION, "--temperature", "0").stdout
    return found[0]["id"], said


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(NAMES[index] for index in order))
def test_it_serves_again(devices: list[Device], served: tuple[str, str], order: tuple[int, ...]) -> None:
    for one in devices:
        one.kill()
    for index in order:
        devices[index].start().wait_ready()
    _, said = answer(devices[0])
    assert said == served[1] and "peerllm" in said
    for one in devices:
        assert [found["state"] for found in one.status()["devices"]] == ["online"] * len(NAMES)
