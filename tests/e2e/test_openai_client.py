"""An answer that three devices compute is traced; killing its client cancels the sequence on every device."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests import traces
from tests.household import Device

STORY = "Tell me a story."
LONG = 900  # tokens: far from over when its client is killed
CANCEL_TIMEOUT_S = 20.0


def talk(device: Device, tokens: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.talker", device.url, device.token(), "builtin", str(tokens), STORY],
        stdout=subprocess.PIPE,
        text=True,
    )


def slots_in_use(devices: list[Device]) -> list[int]:
    return [device.slots_in_use() for device in devices]


def test_an_answer_is_traced(demo: list[Device], tmp_path: Path) -> None:
    """As a person would: a question with --trace, and a look at what goes on."""
    out = tmp_path / "trace.json"
    demo[0].cli("chat", STORY, "--max-tokens", "24", "--temperature", "0", "--trace", str(out))
    trace = json.loads(out.read_text())
    names = [device.name for device in demo]
    traces.check(trace, names)
    for name in names:
        found = traces.passes(trace, name)
        assert len(found) >= 24, f"{name}: a prompt and 24 steps"
        assert len({sequence for one in found for sequence in one["args"]["sequences"]}) == 1
    refused = demo[1].cli("trace", "builtin", "--out", str(out), check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1) and f"started on {demo[0].name}" in refused.stderr


def test_killing_the_client_cancels_everywhere(demo: list[Device], tmp_path: Path) -> None:
    """The story would go on for hundreds of tokens; its slots are free again long before."""
    for device in demo:
        assert device.get("/peerllm/v1/engine")["stages"], f"{device.name} holds no stage"
    with talk(demo[0], LONG) as talker:
        assert talker.stdout is not None
        assert talker.stdout.readline()
        running = slots_in_use(demo)
        talker.kill()
        talker.wait(10)
    assert all(running), f"the sequence holds a slot on every device, not {running}"
    deadline = time.monotonic() + CANCEL_TIMEOUT_S
    while (used := slots_in_use(demo)) != [0, 0, 0]:
        assert time.monotonic() < deadline, f"slots still in use: {used}"
    assert demo[0].status()["deployments"][0]["state"] == "serving"
