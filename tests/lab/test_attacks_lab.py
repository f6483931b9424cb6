"""Attacks, each while four answers are streamed over two devices: none is disturbed, and each gets one clear line.

Floods of connections and messages are in test_floods_lab.py. The devices share a small disk in memory.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.api.test_text_process import DOUBLING, ENDLESS
from tests.clients import PATH, body
from tests.daemon.weights.test_changed_bytes import spoil
from tests.e2e import tiny
from tests.lab.struck_answers import StruckAnswers, requests
from tests.lab.struck_household import StruckHousehold, serving

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
NAMES = ("laptop", "mini-pc")
STREAMS, CONTEXT, TOKENS = 4, 512, 160
SPARE = 8 << 20  # bytes lent besides: for another model
DISK = "320m"  # a cache of weights leaves 256 MB of it free


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[StruckHousehold]:
    model = tiny.make("llama", tmp_path_factory.mktemp("model") / "llama")
    rogue = ("env", f"PYTHONPATH={Path(__file__).parent / 'rogue'}")
    with serving(disk, model, NAMES, 2, STREAMS, CONTEXT, exact=True, spare=SPARE, prefixes={1: rogue}) as household:
        assert set(household.stages()) == set(NAMES)
        yield household


@pytest.fixture(scope="module")
def answers(house: StruckHousehold) -> StruckAnswers:
    """All of them are streamed beside the stage that makes up sequences."""
    model = house.deployment()["name"]
    others = requests(TOKENS, model=model, top_p=0.9)
    return StruckAnswers(house, (*requests(TOKENS, model=model), *others), least=TOKENS)


@contextmanager
def undisturbed(house: StruckHousehold, answers: StruckAnswers) -> Iterator[None]:
    """Streams go on meanwhile; no device is missed, and nothing is planned anew."""
    epoch = house.deployment()["epoch"]
    with answers.streaming():
        yield
    assert house.online(1)
    assert house.deployment()["epoch"] == epoch


def test_a_stage_that_answers_for_unknown_sequences(house: StruckHousehold, answers: StruckAnswers) -> None:
    before = house.load(0)["dropped_frames"]
    with undisturbed(house, answers):
        pass
    assert house.load(0)["dropped_frames"] > before, "it did answer for them"


@pytest.mark.parametrize("nbytes", [300_000, 7_000_000])
def test_a_long_prompt(house: StruckHousehold, answers: StruckAnswers, nbytes: int) -> None:
    prompt = body("lighthouse " * (nbytes // 11), 4, model=house.deployment()["name"])
    with undisturbed(house, answers):
        for host in (0, 1):
            begun = time.monotonic()
            status, _, refused = house.get(host, PATH, prompt)
            assert (status, refused["error"]["code"]) == (400, "context_length_exceeded"), refused
            assert time.monotonic() - begun < 10.0


@pytest.mark.parametrize("template", [DOUBLING, ENDLESS], ids=["doubling", "endless"])
def test_a_hostile_template(
    house: StruckHousehold, answers: StruckAnswers, template: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = tiny.make("qwen3", tmp_path / request.node.callspec.id)
    (model / "chat_template.jinja").write_text(template)
    with undisturbed(house, answers):
        house.devices[1].cli("run", str(model), "--slots", "1", "--context", "64", "--exact")
        try:
            for host in (0, 1):
                status, _, refused = house.get(host, PATH, body("Hello!", 4, model=model.name))
                assert status == 400, refused
        finally:
            house.devices[1].cli("stop", model.name)


def test_a_pipe_in_a_models_place(house: StruckHousehold, answers: StruckAnswers, tmp_path: Path) -> None:
    model = tiny.make("qwen3", tmp_path / "pipe")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    with undisturbed(house, answers):
        done = house.devices[0].cli("run", str(model), "--exact", check=False)
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr and len(done.stderr.strip().splitlines()) <= 3, done.stderr


def test_a_full_disk(house: StruckHousehold, answers: StruckAnswers, disk: Path) -> None:
    filler = disk / "filler"
    try:
        with undisturbed(house, answers):
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            for host in (0, 1):
                status, _, said = house.get(host, "/peerllm/v1/limits", {"battery_percent": 20})
                assert (status, said["battery_percent"]) == (200, 20), "it holds, though it cannot be kept"
        psutil.Process(house.engine(1)).kill()  # starts again on the full disk
        answers.check(answers.begin(1), "after an engine's end on a full disk")
    finally:
        filler.unlink(missing_ok=True)
    house.settled()
    for host in (0, 1):
        house.get(host, "/peerllm/v1/limits", {"battery_percent": 0})
        assert "limits" in (house.devices[host].data_dir / "limits.json").read_text()


def test_changed_bytes_in_every_cached_tensor(house: StruckHousehold, answers: StruckAnswers) -> None:
    """Found before they are used, named in the log, fetched again: the answers that waited are the same."""
    cached = [path for path in (house.devices[1].data_dir / "weights").iterdir() if len(path.name) == 64]
    assert len(cached) >= 8
    good = {path: path.read_bytes() for path in cached}
    begun = answers.begin()
    house.kill(1)
    for path in cached:
        spoil(path, silently=True)
    house.revive(1)
    answers.check(begun, "cached tensors changed")
    house.settled()
    log = (house.devices[1].data_dir / "log.txt").read_text(errors="replace")
    unnamed = {path.name[:8]: len(good[path]) for path in good if f"changed on this disk ({path})" not in log}
    assert not unnamed, "what a plan or a follower uses is found"
    assert all(path.read_bytes() == good[path] for path in good)
    answers.check(answers.begin(), "afterwards")
