"""How weights are rounded: asked for, decided when the model is read, told to people."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peerllm.cli.look import deployment_text
from peerllm.daemon.facade import RunOptions
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
