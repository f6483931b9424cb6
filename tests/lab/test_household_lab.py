"""Three hosts on a bridge become a household through the CLI and answer; a fourth, unpaired one gets nothing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.household import Device
from tests.lab.netns import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
NAMES = ("laptop", "mini-pc", "jetson")
SLOTS, CONTEXT = 2, 512
INTRUDER = 3
QUESTION = "What are you?"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(4) as built:
        yield built


@pytest.fixture(scope="module")
def devices(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    """Default ports; the second device offers its API to the whole LAN."""
    root = tmp_path_factory.mktemp("lab")
    memory = limits(sizes_of(MODEL_DIR, SLOTS, CONTEXT), len(NAMES))
    made = [
        Device(
            root / name,
            name,
            memory=str(memory[host]),
            prefix=lab.argv(host, []),
            port=8643,
            api="0.0.0.0:8642" if host == 1 else "127.0.0.1:8642",
        )
        for host, name in enumerate(NAMES)
    ]
    try:
        for device in made:
            device.start()
        for device in made:
            device.wait_ready()
        yield made
    finally:
        for device in made:
            device.stop()


def intrude(lab: Lab, directory: Path, hosts: list[int]) -> dict[str, dict[str, str]]:
    directory.mkdir(parents=True, exist_ok=True)
    done = lab.run(
        INTRUDER,
        [sys.executable, "-m", "tests.lab.intruder", directory, *(lab.address(host) for host in hosts)],
        timeout_s=300,
    )
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


def holes(found: dict[str, dict[str, str]]) -> list[str]:
    return [
        f"{host} {what}: {came}"
        for host, attempts in found.items()
        for what, came in attempts.items()
        if not came.startswith(("closed", "tls", "4xx"))
    ]


def test_they_pair_by_the_code_alone_and_answer(devices: list[Device]) -> None:
    first = devices[0]
    for joiner in devices[1:]:
        said = first.cli("invite").stdout.split()
        joiner.cli("join", said[-1])  # no --at: the door is found by mDNS
    first.cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
    status = first.status()
    stages = status["deployments"][0]["plan"]["stages"]
    assert {stage["device"] for stage in stages} == set(NAMES)
    assert all(device["state"] == "online" for device in status["devices"])
    answer = first.cli("chat", QUESTION, "--temperature", "0").stdout
    assert "peerllm" in answer, answer
    for other in devices[1:]:  # everyone sees who holds what
        seen = other.status()["deployments"][0]
        assert (seen["state"], seen["plan"]["stages"]) == ("serving", stages)


def test_an_unpaired_host_gets_nothing_anywhere(lab: Lab, devices: list[Device], tmp_path: Path) -> None:
    found = intrude(lab, tmp_path / "intruder", [0, 1, 2])
    assert not holes(found), "\n".join(holes(found)[:20])
    kinds = Counter(came[:3] for attempts in found.values() for came in attempts.values())
    assert kinds["clo"] and kinds["tls"] and kinds["4xx"], kinds  # each way of refusing was met
    offered = {what: came for what, came in found[lab.address(1)].items() if what.startswith("api plain")}
    assert all(came.startswith("4xx 401") for came in offered.values()), offered
    for path in (
        "/v1/chat/completions",
        "/peerllm/v1/run",
        "/control/1",
        f"/weights/{'0' * 64}",
        "/probe/1024",
        f"/data/{'0' * 32}/1/0",
    ):
        assert any(what.endswith(path) for what in offered), f"{path} was not tried"


def test_the_open_door_shows_nothing_but_itself(lab: Lab, devices: list[Device], tmp_path: Path) -> None:
    code = devices[0].cli("invite").stdout.split()[-1]
    found = intrude(lab, tmp_path / "intruder", [0])
    beyond = [hole for hole in holes(found) if " pairing " not in hole]
    assert not beyond, beyond
    answered = {came for what, came in found[lab.address(0)].items() if what.startswith("pairing")}
    assert not any(name in came for came in answered for name in (*NAMES, code)), answered
    devices[0].cli("status")  # and the device is well


def test_a_wrong_code_gets_a_stranger_nowhere(lab: Lab, devices: list[Device], tmp_path: Path) -> None:
    """A fourth daemon with a guessed code: one clear line, exit 1, and three tries close the door."""
    code = devices[0].cli("invite").stdout.split()[-1]
    port = json.loads(devices[0].cli("invite", "--json").stdout)["port"]
    stranger = Device(
        tmp_path / "stranger", "stranger", memory="1MB", prefix=lab.argv(INTRUDER, []), port=8643, api="127.0.0.1:8642"
    ).start()
    try:
        stranger.wait_ready()
        wrong = code[:-6] + ("222222" if not code.endswith("222222") else "333333")
        for _ in range(4):
            done = stranger.cli("join", wrong, "--at", f"{lab.address(0)}:{port}", check=False)
            assert done.returncode == 1
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert {device["name"] for device in stranger.status()["devices"]} == {"stranger"}
        assert "stranger" not in {device["name"] for device in devices[0].status()["devices"]}
    finally:
        stranger.stop()
