"""Models that are on a disk and do not run: listed once, understood under every name, started by a request."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import ollama
import pytest

from peerllm.api.core import model_wait
from peerllm.api.server import ApiServer
from peerllm.daemon.control_messages import DiskModel
from peerllm.daemon.facade import IDLE_MODEL, ServedModel
from peerllm.daemon.status.household_models import startable_models, with_asleep
from peerllm.daemon.weights.known_models import all_names
from peerllm.errors import InfeasibleError
from tests.api.fake import BOUND_S, FakeHousehold

HI = [{"role": "user", "content": "hi"}]
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QWEN = "Qwen/Qwen3-0.6B-GGUF:Q8_0"


def on_disk(name: str, model: str = "") -> ServedModel:
    (one,) = startable_models((), [("", [DiskModel(name, model or name, 1234, 1_600_000_000)])])
    return one


@pytest.fixture
async def lama(server: ApiServer) -> ollama.AsyncClient:
    return ollama.AsyncClient(server.url, headers={"Authorization": "Bearer none"})


@pytest.mark.parametrize(
    "name",
    ["smollm2", "smollm2:latest", "SmolLM2", "SmolLM2-135M-Instruct", "smollm2-135m-instruct:latest", SMOL,
     f"hf.co/{SMOL}"],
)  # fmt: skip
async def test_a_request_under_any_name_starts_it_once(
    lama: ollama.AsyncClient, household: FakeHousehold, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_wait, "UNKNOWN_S", 2 * BOUND_S)  # that nothing runs is no reason to wait
    household.served = [on_disk("smollm2")]
    asked = [lama.chat(name, HI, keep_alive=10) for _ in range(3)]
    answers = await asyncio.wait_for(asyncio.gather(*asked), BOUND_S)
    assert [one.message.content for one in answers] == [household.reply] * 3
    assert household.calls == [("start", "smollm2")]
    assert {one.keep_alive_s for one in household.requests} == {10.0}


async def test_keep_alive_inside_options_reaches_the_model(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    await lama.chat("builtin", HI, options={"keep_alive": "1h"})
    await lama.chat("builtin", HI)
    assert [one.keep_alive_s for one in household.requests] == [3600.0, None]


async def test_why_it_cannot_be_started_is_told(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    household.served, household.run_error = [on_disk("smollm2")], InfeasibleError("it needs 4 GB more", 4)
    with pytest.raises(ollama.ResponseError, match="needs 4 GB more"):
        await lama.chat("smollm2", HI)


async def test_what_says_nothing_loads_or_unloads(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    assert (await lama.generate("builtin", keep_alive=-1)).done_reason == "load"
    assert (await lama.generate("builtin", keep_alive=0)).done_reason == "unload"
    household.served = [on_disk("smollm2")]
    assert (await lama.generate("smollm2", keep_alive=0)).done_reason == "unload"
    kept = [call[2] for call in household.calls if call[0] == "keep"]
    assert kept == [-1.0, 0.0] and not any(call[0] == "start" for call in household.calls)


async def test_lists_have_what_is_on_disk_and_ps_what_is_loaded(
    lama: ollama.AsyncClient, household: FakeHousehold, client: Any
) -> None:
    idle = replace(on_disk("smollm2"), abilities=("tools", "embedding"))
    household.served = [idle, replace(household.model, expires=1_700_000_300)]
    tags = (await lama.list()).models
    async with client.get("/api/tags") as response:
        capabilities = [one["capabilities"] for one in (await response.json())["models"]]
    assert capabilities == [["completion", "tools"], ["completion", "tools", "embedding"]]
    assert [(await lama.show(str(one.model))).capabilities for one in tags] == capabilities
    assert [one.model for one in tags] == ["builtin:latest", "smollm2:latest"]
    assert tags[1].size == 1234
    assert tags[1].details is not None and tags[1].details.parameter_size == "135M"
    (ps,) = (await lama.ps()).models
    assert (
        ps.model == "builtin:latest" and ps.expires_at is not None and int(ps.expires_at.timestamp()) == 1_700_000_300
    )
    async with client.get("/v1/models") as response:
        assert [(one["id"], one["state"]) for one in (await response.json())["data"]] == [
            ("builtin", "serving"),
            ("smollm2", IDLE_MODEL),
        ]


async def test_memory_on_accelerators_is_told_apart(lama: ollama.AsyncClient, household: FakeHousehold) -> None:
    household.devices[1]["compute"] = {**household.devices[1].get("compute", {}), "place": "an accelerator"}
    household.devices[0]["compute"] = {"place": "cpu"}
    stages = household.deployments[0]["plan"]["stages"]
    wanted = sum(one["memory_bytes"] for one in stages if one["device"] == household.devices[1]["name"])
    (ps,) = (await lama.ps()).models
    assert ps.size_vram == wanted > 0 and (ps.size or 0) > wanted


def test_one_that_runs_is_not_listed_again() -> None:
    disks = [DiskModel("smollm2", "smollm2", 1, 1), DiskModel("builtin", "builtin", 1, 1)]
    running = replace(on_disk("mine", SMOL), state="serving", names=all_names("mine", SMOL))
    assert [one.name for one in startable_models([running], [("", disks), ("b" * 64, disks)])] == ["builtin"]
    both = startable_models([], [("", disks[:1]), ("b" * 64, disks)])
    assert [(one.name, one.source) for one in both] == [("smollm2", ""), ("builtin", "b" * 64)]


@pytest.mark.parametrize(
    ("name", "model", "called"),
    [
        ("qwen3-0.6b", "qwen3-0.6b", {QWEN.lower(), "qwen3:0.6b", "qwen3-0.6b-gguf", "qwen/qwen3-0.6b-gguf"}),
        (QWEN, QWEN, {"qwen3-0.6b", "qwen3:0.6b", "qwen3-0.6b-gguf:q8_0"}),
        ("own", "/models/own", {"own", "/models/own"}),
        ("builtin", "builtin", {"builtin"}),
    ],
)
def test_all_names(name: str, model: str, called: set[str]) -> None:
    found = all_names(name, model)
    assert called <= found
    if "/models" in model or model == "builtin":
        assert found == called


def test_another_quantisation_is_another_model() -> None:
    assert "qwen3-0.6b" not in all_names("x", "Qwen/Qwen3-0.6B-GGUF:Q4_0")


def test_where_a_person_ran_it_it_is_started_as_that() -> None:
    here = [DiskModel("smollm2", "smollm2", 5, 6)]
    there = with_asleep([*here, DiskModel("gpt", "smollm2", 0, 0, alias=True)], {"smollm2": "mine", "/gone": "own"})
    found = startable_models([], [("", here), ("b" * 64, there)])
    assert [(one.name, one.source, one.disk_bytes) for one in found] == [
        ("mine", "b" * 64, 5),
        ("own", "b" * 64, 0),
        ("gpt", "b" * 64, 5),
    ]
    assert "smollm2" in found[0].names
