"""`peerllm plan MODEL` and `peerllm bench` against the API, with a household that is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peerllm.cli.figures import bench
from peerllm.cli.figures.bench import divided, predicted
from peerllm.planner.scenario.scenario_parser import parse
from peerllm.types import Stage
from tests.api.fake import SCENARIO, WEIGHTS
from tests.cli.test_commands import Run, Served, device, peerllm

__all__ = ["device", "peerllm"]


def test_a_model_is_planned_as_run_would(peerllm: Run, device: Served) -> None:
    code, out, err = peerllm("plan", "builtin", "--slots", "4", "--objective", "throughput", "--json")
    line = json.loads(out)
    assert code == 0
    assert line["feasible"] and line["stages"] == [{"device": "laptop", "first_layer": 0, "last_layer": 3}]
    assert line["predicted"]["micro_batch"] * line["predicted"]["micro_batches"] <= 4
    assert "measuring laptop" in err
    ((_, options),) = [call for call in device.household.calls if call[0] == "preview"]
    assert (options.model, options.slots, options.objective) == ("builtin", 4, "throughput")


def test_what_was_planned_for_can_be_kept_and_planned_again(peerllm: Run, tmp_path: Path) -> None:
    kept = tmp_path / "scenario.json"
    assert peerllm("plan", "builtin", "--save", str(kept))[0] == 0
    first = json.loads(peerllm("plan", "builtin", "--json")[1])
    again = json.loads(peerllm("plan", str(kept), "--json")[1])
    assert (first.pop("activations"), first.pop("prompt_chunk"), first.pop("weights")) == ([], 16, WEIGHTS)
    told = [one["predicted"].pop("time_to_first_token_ms") for one in (first, again)]
    assert {**first, "solve_ms": 0} == {**again, "solve_ms": 0}
    assert told == [pytest.approx(2 * 0.1 + 4 * 1.5 + 0.9), pytest.approx(0.1 + 2 * 1.5 + 0.9)], "in chunks, and whole"


def test_people_are_told_how_prompts_are_cut(peerllm: Run) -> None:
    assert "First token after 7.1 ms (of a prompt of 32, in chunks of 16), then" in peerllm("plan", "builtin")[1]


def test_how_weights_would_be_held_is_told(peerllm: Run, device: Served) -> None:
    assert f"\nweights: {WEIGHTS}\n" in peerllm("plan", "builtin")[1]
    assert peerllm("plan", "builtin", "--exact")[0] == 0
    auto, exact = (options for name, options in device.household.calls)
    assert (auto.dtype, auto.quantize, exact.dtype, exact.quantize) == ("auto", "auto", "float32", "none")


def test_how_activations_would_travel_is_told(peerllm: Run, device: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    laptop = {**SCENARIO["devices"][0], "memory_bytes": 1_100}
    both = [laptop, {**laptop, "name": "mini", "memory_bytes": 2_000}]
    monkeypatch.setitem(SCENARIO, "devices", both)
    monkeypatch.setitem(SCENARIO, "links", {"default": {"mbps": 1, "latency_ms": 1}})
    device.household.rounded_layers = [1]
    line = json.loads(peerllm("plan", "builtin", "--activations", "int8", "--json")[1])
    assert [one["last_layer"] for one in line["stages"]] == [1, 3] and line["activations"] == ["int8"]
    assert device.household.calls[-1][1].activations == "int8"
    assert peerllm("plan", "builtin")[1].count(" as int8") == 1
    device.household.rounded_layers = []
    assert json.loads(peerllm("plan", "builtin", "--json")[1])["activations"] == ["exact"]
    assert " as int8" not in peerllm("plan", "builtin")[1]


def test_an_unknown_model_and_a_place_that_cannot_be_written(peerllm: Run, tmp_path: Path) -> None:
    code, _, err = peerllm("plan", "unknown")
    assert code == 1
    assert err.splitlines()[-1] == "peerllm: no model 'unknown'"
    code, _, err = peerllm("plan", "builtin", "--save", str(tmp_path / "no" / "where.json"))
    assert code == 1
    assert "cannot be written" in err.splitlines()[-1]


def test_a_directory_is_a_model(peerllm: Run, device: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "builtin").mkdir()
    monkeypatch.chdir(tmp_path)
    assert peerllm("plan", "builtin", "--json")[0] == 0, "the built-in one, whatever lies here"
    (tmp_path / "mine").mkdir()
    peerllm("plan", "mine", "--json")
    asked = [options.model for call, options in device.household.calls if call == "preview"]
    assert asked == ["builtin", str(tmp_path / "mine")]


@pytest.fixture(autouse=True)
def _no_need_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WARM_S", 0.0)


def test_bench_prints_the_prediction_beside_what_was_measured(peerllm: Run, device: Served) -> None:
    code, out, _ = peerllm("bench", "--json", "--output-tokens", "16")
    found = json.loads(out)
    assert code == 0
    assert [one["sequences"] for one in found["runs"]] == [1, 2, 4]
    one = found["runs"][0]
    assert one["predicted"]["step_ms"] == pytest.approx(0.1 + 2 * 1.5 + 0.9)
    assert one["predicted"]["formula_tokens_per_second"] == pytest.approx(250)
    assert one["predicted"]["steady_tokens_per_second"] == pytest.approx(250, rel=0.01)
    assert one["measured"]["steady_tokens_per_second"] == 250
    assert one["predicted"]["time_to_first_token_ms"] == pytest.approx(2 * 0.1 + 4 * 1.5 + 0.9)  # two chunks of 16
    asked = {call[2:] for call in device.household.calls if call[0] == "bench"}
    assert asked == {(n, 32, 16, False) for n in (1, 2, 4)}


def test_bench_for_people(peerllm: Run) -> None:
    code, out, _ = peerllm("bench", "--sequences", "1", "--apart")
    assert code == 0
    assert "predicted" in out and "measured" in out and out.count("1.00") == 1
    assert peerllm("bench", "--model", "other")[0] == 1


def test_a_prediction_divides_the_sequences_as_the_deployment_does() -> None:
    planned = {"schedule": "no-bubble", "micro_batch": 4, "micro_batches": 2}
    assert [divided(planned, n)[1:] for n in (1, 2, 5, 8, 9)] == [(1, 1), (2, 2), (5, 2), (8, 2), (9, 3)]
    assert divided(planned | {"schedule": "sequential"}, 5) == ("sequential", 5, 5)
    scenario = parse(SCENARIO)
    stages = (Stage("laptop", 0, 3),)
    rates = [
        predicted(scenario, stages, schedule, n, 2, 8, 32)["predicted"]["formula_tokens_per_second"]
        for schedule, n in (("no-bubble", 6), ("no-bubble", 5), ("bubble", 6))
    ]
    assert rates[1] == pytest.approx(rates[0] * 5 / 6)  # three and two go at the pace of three and three
    assert rates[2] <= rates[0]
