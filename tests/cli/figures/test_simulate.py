"""`peerllm simulate`: one JSON object a line, exit codes, text for people, and the chart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from peerllm.cli.figures import gantt
from peerllm.cli.figures.plan import answer
from peerllm.cli.figures.simulate import bar, simulated
from peerllm.cli.main import main
from peerllm.planner.simulator import simulation

KEYS = {
    "strategy", "objective", "schedule", "feasible", "reason", "stages", "devices", "links", "media", "micro_batch",
    "micro_batches", "tokens", "makespan_ms", "tokens_per_second", "steady_tokens_per_second",
    "formula_tokens_per_second", "time_to_first_token_ms", "step_ms",
}  # fmt: skip


def scenario(**changes):
    """Three devices; no two of them hold the model."""
    sizes = {"memory_bytes": 100, "kv_bytes_per_token": 0, "output_bytes_per_token": 1000}
    kinds = ("embedding", "block", "head")
    speeds = {"laptop": 2.0, "jetson": 3.0, "mini-pc": 4.0}
    return {
        "model": {"name": "m", "layers": [
            {"name": "embedding", "kind": "embedding", **sizes},
            {"name": "block", "kind": "block", "repeat": 7, **sizes},
            {"name": "head", "kind": "head", **sizes},
        ]},
        "devices": [
            {"name": name, "memory_bytes": 350, "layer_ms": {kind: {"1": ms} for kind in kinds}}
            for name, ms in speeds.items()
        ],
        "links": {"default": {"mbps": 8, "latency_ms": 1.0}},
        "source": "laptop",
        "workload": {"prompt_tokens": 4, "output_tokens": 40, "sequences": 3, "context": 64},
        **changes,
    }  # fmt: skip


@pytest.fixture
def files(tmp_path: Path):
    def write(**scenarios) -> list[str]:
        paths = []
        for name, content in scenarios.items():
            path = tmp_path / f"{name}.json"
            path.write_text(content if isinstance(content, str) else json.dumps(content))
            paths.append(str(path))
        return paths

    return write


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_plan_for_latency_takes_what_its_sums_say(files, capsys):
    assert main(["simulate", *files(a=scenario()), "--strategy", "even", "--json"]) == 0
    (line,) = lines(capsys)
    assert set(line) == KEYS
    assert line["feasible"] and line["reason"] is None
    assert (line["strategy"], line["objective"], line["schedule"]) == ("even", "latency", "no-bubble")
    assert [(s["first_layer"], s["last_layer"]) for s in line["stages"]] == [(0, 2), (3, 5), (6, 8)]
    assert line["stages"][0]["device"] == "laptop"
    lap = 3 * (2 + 3 + 4) + 3 * (1 + 1)
    first = 3 * (2 + 3 + 4) + 2 * (1 + 4) + 2
    assert line["time_to_first_token_ms"] == [pytest.approx(first)]
    assert line["makespan_ms"] == pytest.approx(first + 39 * lap)
    assert line["tokens"] == 40
    assert line["tokens_per_second"] == pytest.approx(40_000 / (first + 39 * lap))
    assert line["steady_tokens_per_second"] == pytest.approx(1000 / lap)
    assert line["formula_tokens_per_second"] == pytest.approx(1000 / lap)
    assert line["stages"][0]["utilisation"] == pytest.approx(40 * 6 / line["makespan_ms"])
    assert line["devices"]["laptop"] == {"utilisation": line["stages"][0]["utilisation"], "mean_wait_ms": 0.0}
    assert [link["from"] for link in line["links"]] == [s["device"] for s in line["stages"]]
    assert line["links"][-1]["to"] == "laptop"
    assert line["media"] == {}


@pytest.mark.parametrize("schedule", ["sequential", "bubble", "no-bubble"])
def test_throughput_reaches_the_formula(schedule, files, capsys):
    argv = ["--objective", "throughput", "--schedule", schedule, "--json"]
    assert main(["simulate", *files(a=scenario()), *argv]) == 0
    (line,) = lines(capsys)
    assert line["schedule"] == schedule
    assert line["steady_tokens_per_second"] == pytest.approx(line["formula_tokens_per_second"], rel=0.01)
    assert line["tokens"] == 40 * line["micro_batch"] * line["micro_batches"]
    assert len(line["time_to_first_token_ms"]) == line["micro_batches"]


def test_shared_media_are_shown(files, capsys):
    wifi = [{"name": "wifi", "devices": ["jetson", "mini-pc"]}]
    argv = ["simulate", *files(a=scenario(shared_media=wifi)), "--objective", "throughput"]
    assert main([*argv, "--json"]) == 0
    (line,) = lines(capsys)
    assert 0 < line["media"]["wifi"]["utilisation"] <= 1
    assert main(argv) == 0
    assert "SHARED MEDIUM" in capsys.readouterr().out


def test_steps_are_the_tokens_of_each_sequence(files, capsys):
    assert main(["simulate", *files(a=scenario()), "--json", "--steps", "1"]) == 0
    (line,) = lines(capsys)
    assert line["tokens"] == 1
    assert line["steady_tokens_per_second"] is None and line["step_ms"] is None
    assert line["makespan_ms"] == line["time_to_first_token_ms"][0]


def test_several_files_are_all_answered(files, capsys):
    small = scenario(devices=[{**scenario()["devices"][0]}])
    paths = files(good=scenario(), small=small, bad=scenario(source="nobody"), torn="{")
    assert main(["simulate", *paths]) == 2
    good, small, bad, torn = lines(capsys)
    assert good["feasible"] is True and "error" not in good
    assert small["feasible"] is False and "missing" in small["reason"]
    assert small["stages"] == [] and small["makespan_ms"] is None
    assert set(small) == KEYS | {"file"}
    assert bad["feasible"] is None and "source" in bad["error"]
    assert "JSON" in torn["error"]
    assert main(["simulate", *paths[:2]]) == 1


def test_one_file_for_people(files, capsys):
    assert main(["simulate", *files(a=scenario()), "--objective", "throughput"]) == 0
    shown = capsys.readouterr().out
    for text in ("no-bubble", "DEVICE", "LINK", "laptop", "█", "tokens/s while all decode (formula", "First tokens"):
        assert text in shown
    assert main(["simulate", *files(bad=scenario(source="nobody"))]) == 2
    found = capsys.readouterr()
    assert not found.out and found.err.startswith("peerllm: ") and found.err.count("\n") == 1


def test_what_takes_no_time_is_null_and_not_infinite(files, capsys):
    devices = [{"name": "laptop", "memory_bytes": 9999,
                "layer_ms": {kind: {"1": 0} for kind in ("embedding", "block", "head")}}]  # fmt: skip
    path = files(a=scenario(devices=devices))
    assert main(["simulate", *path, "--json"]) == 0
    (line,) = lines(capsys)
    assert line["tokens_per_second"] is None and line["steady_tokens_per_second"] is None
    assert main(["simulate", *path]) == 0


def test_too_long_a_run_is_an_error_of_its_line(files, capsys, monkeypatch):
    monkeypatch.setattr(simulation, "MAX_SPANS", 100)
    assert main(["simulate", *files(a=scenario(), b=scenario()), "--json"]) == 2
    assert all("lower the steps" in line["error"] for line in lines(capsys))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_chart(suffix, files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    chart = tmp_path / f"chart.{suffix}"
    argv = ["--objective", "throughput", "--plot", str(chart)]
    assert main(["simulate", *files(a=scenario()), *argv]) == 0
    if suffix == "png":
        assert chart.read_bytes().startswith(b"\x89PNG")
    else:
        assert ElementTree.parse(chart).getroot().tag.endswith("svg")
    assert main(["simulate", *files(a=scenario()), "--plot", str(tmp_path / "missing" / f"x.{suffix}")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_names_are_drawn_as_they_are(files, tmp_path):
    pytest.importorskip("matplotlib")
    text = json.dumps(scenario()).replace("mini-pc", "$\\\\frac{$ to \\u0007")
    assert main(["simulate", *files(a=text), "--plot", str(tmp_path / "x.svg")]) == 0


def test_a_chart_needs_matplotlib(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["simulate", *files(a=scenario()), "--plot", str(tmp_path / "x.png")]) == 1
    assert "pip install 'peerllm[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_charts_that_are_refused(files, tmp_path, capsys):
    one, other = files(a=scenario(), b=scenario())
    assert main(["simulate", one, other, "--plot", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.startswith("usage: peerllm simulate")
    assert main(["simulate", one, "--plot", str(tmp_path / "x.gif")]) == 2
    assert ".svg or .png" in capsys.readouterr().err
    assert list(tmp_path.glob("x.*")) == []


def test_a_chart_shows_a_few_steps_or_all(files, monkeypatch):
    found = answer(files(a=scenario())[0], "edgeshard", "throughput")
    run = simulated(found.scenario, found.plan, "no-bubble").run
    assert gantt.window_ms(run, whole=True) == run.makespan_ms
    part = gantt.window_ms(run)
    assert max(times[gantt.DRAWN_STEPS] for times in run.returns) <= part < run.makespan_ms / 2
    monkeypatch.setattr(gantt, "MAX_BARS", 20)
    assert sum(span.start_ms < gantt.window_ms(run, whole=True) for span in run.events) <= 20


def test_colours_tell_groups_apart():
    assert len(set(gantt.palette(64))) == 64
    assert gantt.palette(3) == gantt.palette(8)[:3]
    assert gantt.lighter("#000000") == "#8c8c8c"
    assert gantt.lighter("#ffffff") == "#ffffff"


@pytest.mark.parametrize(("share", "full"), [(0, 0), (0.001, 1), (0.5, 5), (1, 10)])
def test_a_bar_shows_the_share(share, full):
    assert bar(share, 10) == "█" * full + "·" * (10 - full)


def test_matplotlib_is_imported_for_charts_alone():
    code = "import sys, peerllm.cli.figures.simulate; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
