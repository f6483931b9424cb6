"""How weights are rounded: asked for, decided when the model is read, told to people."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peerllm.cli.look import deployment_text
from peerllm.daemon.control_messages import DiskModel
from peerllm.daemon.facade import ModelDetails, RunOptions
from peerllm.daemon.status.household_models import HouseholdModels, startable_models
from peerllm.daemon.status.status import deployment_entry, weights_form
from peerllm.errors import BadInputError
from tests.daemon.house import House, inspected, quiet


@pytest.mark.parametrize(
    ("dtype", "quantize", "wanted", "form", "words"),
    [
        ("", "", "auto", "", ""),
        ("float32", "int8", "auto", "", "16-bit, rounded to 8 bits (--quantize none keeps them)"),
        ("float16", "int4", "int4", "Q4_K_M", "rounded to 4 bits (as asked for)"),
        ("bfloat16", "", "none", "", "16-bit, not rounded"),
        ("float32", "", "auto", "Q4_K_M", "float32, not rounded"),
        ("float32", "int8", "int8", "", "rounded to 8 bits (as asked for)"),
        ("float32", "stored", "auto", "Q4_K_M", "Q4_K_M, as in the file"),
        ("float32", "stored", "none", "", "as in the file"),
    ],
)
def test_words(dtype: str, quantize: str, wanted: str, form: str, words: str) -> None:
    assert weights_form(dtype, quantize, wanted, form) == words


@pytest.fixture
async def house(tmp_path):
    made = House(tmp_path, [10**9], {"big": replace(inspected("big", 8), quantize="int8")})
    yield made
    await made.close()


async def test_what_was_decided_is_told_by_the_preview_and_by_what_runs(house):
    coordinator = house["a"].coordinator
    words = "16-bit, rounded to 8 bits (--quantize none keeps them)"
    assert (await coordinator.figures.preview(RunOptions("big"), quiet))["weights"] == words
    await coordinator.run(RunOptions("big"), quiet)
    (view,) = coordinator.views()
    entry = deployment_entry(view, house["a"].name)
    assert (entry["weights"], entry["quantize"]) == (words, "auto")
    assert (entry["plan"]["dtype"], entry["plan"]["quantize"]) == ("float32", "int8")
    assert f"\nweights: {words}" in deployment_text(entry)


async def test_the_quantisation_of_gguf_files_is_told(house):
    house.models["big"] = replace(inspected("big", 8), quantize="stored")
    house.forms["big"] = "Q4_K_M"
    coordinator = house["a"].coordinator
    assert (await coordinator.figures.preview(RunOptions("big"), quiet))["weights"] == "Q4_K_M, as in the file"
    await coordinator.run(RunOptions("big"), quiet)
    assert deployment_entry(coordinator.views()[0], house["a"].name)["weights"] == "Q4_K_M, as in the file"


async def test_asking_again_need_not_name_what_was_asked_for(house):
    run = house["a"].coordinator.run
    await run(RunOptions("big", quantize="int8", dtype="float32"), quiet)
    await run(RunOptions("big"), quiet)
    for other in (RunOptions("big", quantize="none"), RunOptions("big", dtype="float16")):
        with pytest.raises(BadInputError, match="other options"):
            await run(other, quiet)


@pytest.mark.parametrize(
    ("form", "quantize", "dtype", "told"),
    [
        ("Q4_K_M", "stored", "float32", ("gguf", "Q4_K_M")), ("Q4_K_M", "int8", "float32", ("gguf", "INT8")),
        ("", "", "bfloat16", ("safetensors", "BF16")), ("", "int4", "float32", ("safetensors", "INT4")),
        ("", "stored", "float32", ("safetensors", "")),
    ],
)  # fmt: skip
def test_short_words_for_clients(form: str, quantize: str, dtype: str, told: tuple[str, str]) -> None:
    found = ModelDetails.of("llama", 5, form, quantize, dtype)
    assert (found.file_format, found.level) == told and (found.family, found.parameters) == ("llama", 5)
    assert ModelDetails.of("", 0, form, quantize, dtype) == ModelDetails()


async def test_others_are_told_the_same(houses: Any) -> None:
    house = houses([9], big=4)
    coordinator = house["a"].coordinator
    await coordinator.run(RunOptions("big"), quiet)
    models = HouseholdModels()
    models.hear(["a" * 64], {"a" * 64: coordinator.views()})
    (there,), (here,) = models.others(lambda device: device), coordinator.served()
    assert there.details == here.details and here.details.family == "llama"
    assert here.details.parameters == sum(one.memory_bytes // 4 for one in inspected("big", 4).profile.layers)


@pytest.mark.parametrize(
    ("model", "details"),
    [
        ("smollm2", ModelDetails("llama", 135_000_000, "safetensors", "")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", ModelDetails("llama", 135_000_000, "safetensors", "")),
        ("qwen3-0.6b:Q4_0", ModelDetails("qwen3", 596_000_000, "gguf", "Q4_0")),
        ("maker/thing:Q5_K_M", ModelDetails("", 0, "gguf", "Q5_K_M")),
        ("/m/thing-Q6_K.gguf", ModelDetails("", 0, "gguf", "Q6_K")),
        ("/m/thing", ModelDetails()),
    ],
)  # fmt: skip
def test_a_name_tells_what_is_on_the_disk(model: str, details: ModelDetails) -> None:
    (found,) = startable_models((), [("", [DiskModel("x", model, 1, 1)])])
    assert found.details == details
