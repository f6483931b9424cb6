"""`peerllm plan` from end to end: the lines it prints, the table, the exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peerllm.cli.main import main
from peerllm.cli.parser import build_parser
from peerllm.planner.scenario.scenario import STRATEGIES

Raw = dict[str, Any]
KEYS = ["strategy", "objective", "feasible", "reason", "stages", "predicted", "optimal", "bound", "solve_ms"]
PREDICTED = [
    "time_to_first_token_ms",
    "step_ms",
    "request_ms",
    "tokens_per_second",
    "micro_batch",
    "micro_batches",
    "bottleneck",
]


def scenario(**changes: Any) -> Raw:
    """Two devices; the source holds the embedding and two of the four blocks."""

    def speed() -> Raw:
        return {"embedding": {"1": 0.5}, "block": {"1": 2.0}, "head": {"1": 1.0}}

    sizes = {"memory_bytes": 100, "kv_bytes_per_token": 0, "output_bytes_per_token": 1000}
    kinds = ({"kind": "embedding"}, {"kind": "block", "repeat": 4}, {"kind": "head"})
    return {
        "model": {"name": "small", "layers": [{"name": one["kind"], **one, **sizes} for one in kinds]},
        "devices": [{"name": name, "memory_bytes": 300, "layer_ms": speed()} for name in ("a", "b")],
        "links": {"default": {"mbps": 8, "latency_ms": 1.0}},
        "source": "a",
        "workload": {"prompt_tokens": 1, "output_tokens": 3, "sequences": 1, "context": 10},
        **changes,
    }


def written(folder: Path, name: str, raw: object) -> str:
    path = folder / name
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return str(path)


def lines(capsys: pytest.CaptureFixture[str]) -> list[Raw]:
    said = capsys.readouterr()
    assert not said.err
    return [json.loads(line) for line in said.out.splitlines()]


def test_the_object_is_as_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = scenario()
    raw["devices"][0]["layer_ms"]["head"] = {"1": 1.5}  # else it could as well go back to the source
    assert main(["plan", written(tmp_path, "s.json", raw), "--json"]) == 0
    (found,) = lines(capsys)
    assert list(found) == KEYS and list(found["predicted"]) == PREDICTED
    assert found["stages"] == [
        {"device": "a", "first_layer": 0, "last_layer": 2},
        {"device": "b", "first_layer": 3, "last_layer": 5},
    ]
    step = 0.5 + 4 * 2 + 1 + 2 * (1 + 1)  # two hops of 1 ms and 1000 bytes at 8 Mbps
    assert found["predicted"]["step_ms"] == pytest.approx(step)
    assert found["predicted"]["request_ms"] == pytest.approx(3 * step)
    assert found["predicted"]["tokens_per_second"] == pytest.approx(1000 / step)
    assert found["bound"] == found["predicted"]["request_ms"]
    assert (found["strategy"], found["objective"]) == ("edgeshard", "latency")
    assert (found["feasible"], found["reason"], found["optimal"]) == (True, None, True)
    assert found["solve_ms"] >= 0


def test_throughput_speaks_of_tokens_per_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "s.json", scenario())
    assert main(["plan", file, "--objective", "throughput", "--json"]) == 0
    (found,) = lines(capsys)
    assert found["predicted"]["tokens_per_second"] == pytest.approx(1000 / 13.5)  # one sequence: the ring is the limit
    assert found["bound"] == found["predicted"]["tokens_per_second"]
    assert (found["predicted"]["micro_batch"], found["predicted"]["micro_batches"]) == (1, 1)


def test_several_files_are_answered_each_on_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = scenario()
    small["devices"][1]["memory_bytes"] = 100
    wrong = scenario()
    del wrong["devices"][1]["layer_ms"]["block"]
    files = [
        written(tmp_path, "malformed.json", wrong),
        written(tmp_path, "infeasible.json", small),
        written(tmp_path, "broken.json", "{"),
        str(tmp_path / "missing.json"),
        written(tmp_path, "good.json", scenario()),
    ]
    assert main(["plan", *files]) == 2
    found = lines(capsys)
    assert [one["file"] for one in found] == files
    assert found[0]["error"].startswith("devices[1].layer_ms.block is missing")
    assert "JSON" in found[2]["error"] and "cannot be read" in found[3]["error"]
    assert [one["feasible"] for one in found] == [None, False, None, None, True]
    assert ["error" in one for one in found] == [True, False, True, True, False]
    assert all(list(one)[: len(KEYS)] == KEYS for one in found)
    assert "200 bytes" in found[1]["reason"] and found[1]["stages"] == [] and found[1]["predicted"] is None
    assert main(["plan", files[1], files[4]]) == 1
    assert main(["plan", files[4], files[4]]) == 0


def test_exact_bytes_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = scenario()
    raw["model"]["layers"][1]["memory_bytes"] = 1_234_567
    assert main(["plan", written(tmp_path, "s.json", raw), "--json"]) == 1
    assert str(4 * 1_234_567 + 200 - 600) in lines(capsys)[0]["reason"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"model": NaN}', "model"),
        ('{"model": {"name": "\\ud800"}}', "model.name"),
        ('{"model": {"name": "m", "layers": [{"repeat": 1e999}]}}', "model.layers[0].repeat"),
    ],
)
def test_what_json_does_not_know_is_named_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, key: str
) -> None:
    assert main(["plan", written(tmp_path, "s.json", text), "--json"]) == 2
    assert lines(capsys)[0]["error"].startswith(key)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"model": 1' + "0" * 5000 + "}", "\x00", "[1,]"])
def test_any_text_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["plan", written(tmp_path, "s.json", text), "--json"]) == 2
    assert lines(capsys)[0]["error"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str, objective: str) -> None:
    raw = scenario(cloud="b")
    for device in raw["devices"]:
        device["memory_bytes"] = 600
    file = written(tmp_path, "s.json", raw)
    assert main(["plan", file, "--strategy", strategy, "--objective", objective]) == 0
    said = capsys.readouterr().out
    assert f"small: {strategy}, {objective}; " in said
    assert "600 bytes" in said and "█" in said and "tokens/s" in said and "Busiest: " in said


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = scenario(source="\x1b[31mred")
    raw["devices"][0]["name"] = raw["source"]
    raw["model"]["name"] = "m\x1b]0;x\x07"
    file = written(tmp_path, "s.json", raw)
    assert main(["plan", file]) == 0
    raw["devices"][0]["memory_bytes"] = 1
    assert main(["plan", written(tmp_path, "s.json", raw)]) == 1
    said = capsys.readouterr()
    assert "[31mred" in said.out and "m]0;x" in said.err
    assert "\x1b" not in said.out + said.err


def test_one_bad_file_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = scenario()
    del raw["workload"]["context"]
    assert main(["plan", written(tmp_path, "s.json", raw)]) == 2
    assert capsys.readouterr() == ("", "peerllm: workload.context is missing\n")
    assert main(["plan", written(tmp_path, "s.json", scenario()), "--strategy", "cloud-edge-opt"]) == 2
    assert capsys.readouterr().err.startswith("peerllm: cloud is missing")


@pytest.mark.parametrize(("name", "code"), [("no-such-model", 1), ("no-such.json", 2), (".", 1), ("a\0b", 1)])
def test_what_is_no_file_is_said(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What looks like no file is a model of the live household, and here is none."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert main(["plan", name]) == code
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("peerllm: ") and said.err.count("\n") == 1


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = io.TextIOWrapper(io.BytesIO(json.dumps(scenario()).encode()))
    monkeypatch.setattr(sys, "stdin", given)
    assert main(["plan", "-", "--json"]) == 0
    assert lines(capsys)[0]["feasible"]


def test_layers_that_cost_nothing_do_not_break_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = scenario()
    for device in raw["devices"]:
        device["memory_bytes"], device["layer_ms"] = 600, {kind: {"1": 0} for kind in device["layer_ms"]}
    file = written(tmp_path, "s.json", raw)
    for objective in ("latency", "throughput"):
        assert main(["plan", file, "--objective", objective, "--json", "--strategy", "edge-solo"]) == 0
        assert lines(capsys)[0]["predicted"]["step_ms"] == 0
        assert main(["plan", file, "--objective", objective]) == 0
        assert "not proven" not in capsys.readouterr().out


def test_a_file_name_need_not_be_utf_8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.json"
    Path(os.fsdecode(path)).write_text(json.dumps(scenario()))
    command = [sys.executable, "-m", "peerllm", "plan", path, path]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert [json.loads(line)["feasible"] for line in done.stdout.splitlines()] == [True, True]


def test_planning_needs_neither_torch_nor_the_network_libraries(tmp_path: Path) -> None:
    code = (
        "import sys; from peerllm.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print([one for one in ('torch', 'transformers', 'aiohttp', 'tokenizers', 'zeroconf') if one in sys.modules])\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "plan", written(tmp_path, "s.json", scenario()), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_what_can_be_typed(command: str) -> None:
    typed = build_parser().parse_args([command, "a.json", "b.json", "--objective", "throughput", "--strategy", "even"])
    assert (typed.module, typed.function, typed.scenarios) == (f"figures.{command}", "run", ["a.json", "b.json"])
    assert (typed.objective, typed.strategy, typed.json) == ("throughput", "even", False)
    typed = build_parser().parse_args([command, "-"])
    assert (typed.objective, typed.strategy) == ("latency", "edgeshard")


def test_what_else_simulate_takes() -> None:
    typed = build_parser().parse_args(["simulate", "s.json"])
    assert (typed.schedule, typed.steps, typed.plot) == ("no-bubble", None, None)
    more = ["--schedule", "bubble", "--steps", "9", "--plot", "x.svg"]
    typed = build_parser().parse_args(["simulate", "s.json", *more])
    assert (typed.schedule, typed.steps, typed.plot) == ("bubble", 9, Path("x.svg"))


@pytest.mark.parametrize(
    "argv",
    [
        ["plan"],
        ["plan", "s.json", "--strategy", "best"],
        ["plan", "s.json", "--objective", "fun"],
        ["plan", "s.json", "--strat", "even"],
        ["simulate", "s.json", "--schedule", "x"],
        ["simulate", "s.json", "--steps", "0"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: peerllm")
