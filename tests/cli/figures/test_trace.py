"""`peerllm trace` and `--trace FILE` against the API, with a household that is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peerllm.cli.figures.timeline import bars
from peerllm.cli.figures.trace import shared
from peerllm.cli.parser import build_parser
from tests.api.fake import TRACE
from tests.cli.test_commands import Run, Served, device, peerllm

__all__ = ["device", "peerllm"]


def records(device: Served) -> list[str]:
    return [call[0] for call in device.household.calls if call[0] in ("record", "recorded", "bench")]


def test_a_trace_is_written_and_told(peerllm: Run, device: Served, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    code, said, err = peerllm("trace", "--seconds", "0.01", "--out", str(out))
    assert code == 0 and json.loads(out.read_text()) == TRACE
    assert records(device) == ["record", "recorded"] and device.household.calls[-1] == ("recorded", "builtin", 7)
    assert err == "recording builtin for 0.01 s\n"
    laptop = next(line for line in said.splitlines() if line.startswith("laptop "))
    assert laptop.split()[1:6] == ["1", "60%", "40%", "20%", "50%"], said
    assert "jetson tells nothing: it is gone" in said and "mini-pc: its first 12 spans are lost" in said
    code, said, err = peerllm("trace", "builtin", "--seconds", "0.01", "--out", str(out), "--json")
    found = json.loads(said)
    assert (code, err) == (0, "") and found["file"] == str(out)
    assert found["devices"][0]["sending_while_computing"] == pytest.approx(0.25)


def test_refusals_are_one_line(peerllm: Run, device: Served, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    for where, word in ((tmp_path, "cannot be written"), (tmp_path / "no" / "such", "No such file")):
        for command in (["trace", "--out"], ["chat", "hi", "--trace"], ["bench", "--trace"]):
            code, said, err = peerllm(*command, str(where))
            assert (code, said, err.count("\n")) == (1, "", 1) and word in err
    assert not device.household.calls, "nothing is recorded that cannot be kept"
    assert "--trace needs a PROMPT" in peerllm("chat", "--trace", str(out))[2]
    assert "other is not served from this device" in peerllm("trace", "other", "--out", str(out))[2]
    device.household.deployments[0]["coordinator"] = "jetson"
    assert "started on jetson" in peerllm("trace", "builtin", "--out", str(out))[2]
    device.household.deployments = []
    assert "no model is served from this device" in peerllm("trace", "--out", str(out))[2]
    assert not out.exists()


def test_an_answer_is_recorded(peerllm: Run, device: Served, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    code, said, err = peerllm("chat", "hello", "--trace", str(out))
    assert code == 0 and said.strip() and err.endswith("https://ui.perfetto.dev\n")
    assert json.loads(out.read_text()) == TRACE
    assert records(device) == ["record", "recorded"]


def test_a_round_of_its_own_is_recorded(
    peerllm: Run, device: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerllm.cli.figures.bench.WARM_S", 0.0)
    out = tmp_path / "trace.json"
    assert peerllm("bench", "--sequences", "1", "--trace", str(out))[0] == 0
    assert records(device)[-3:] == ["record", "bench", "recorded"] and records(device).count("record") == 1
    assert json.loads(out.read_text()) == TRACE


def test_a_trace_is_read_and_drawn(peerllm: Run, device: Served, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, chart = tmp_path / "trace.json", tmp_path / "chart.svg"
    file.write_text(json.dumps(TRACE))
    code, said, err = peerllm("trace", "--read", str(file), "--plot", str(chart), "--json")
    assert (code, err) == (0, "") and json.loads(said)["devices"][0]["on_the_way_while_computing"] == 0.5
    assert "<svg" in chart.read_text() and not records(device)
    assert [(bar.row, bar.start, bar.end) for bar in bars(TRACE)] == [
        ("laptop", pytest.approx(0.1), pytest.approx(0.16)),
        ("laptop → mini-pc", pytest.approx(0.15), pytest.approx(0.17)),
        ("mini-pc", pytest.approx(0.15), pytest.approx(0.2)),
    ]


def test_a_bad_file_is_refused_in_a_line(peerllm: Run, device: Served, tmp_path: Path) -> None:
    file, chart = tmp_path / "trace.json", tmp_path / "chart.png"
    for content in ("", "[]", "{}", '{"otherData": {}, "traceEvents": [{"ph": "X"}]}', "\0"):
        file.write_text(content)
        code, said, err = peerllm("trace", "--read", str(file), "--plot", str(chart))
        assert (code, said, err.count("\n")) == (1, "", 1) and "no trace" in err and not chart.exists()
    assert "cannot be read" in peerllm("trace", "--read", str(tmp_path / "none"))[2]
    assert "must end in" in peerllm("trace", "--out", str(file), "--plot", str(tmp_path / "x.pdf"))[2]
    file.write_text(json.dumps({**TRACE, "traceEvents": []}))
    assert "nothing to draw" in peerllm("trace", "--read", str(file), "--plot", str(chart))[2]


@pytest.mark.parametrize("seconds", ["0", "-1", "601", "nan", "inf", "soon"])
def test_how_long_is_checked(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        build_parser().parse_args(["trace", "--seconds", seconds])
    assert error.value.code == 2 and "seconds" in capsys.readouterr().err


def test_shared_time() -> None:
    assert shared([(0, 10), (20, 30)], [(5, 25), (26, 27)]) == 11
    assert shared([], [(0, 1)]) == shared([(0, 1)], []) == shared([(0, 1)], [(1, 2)]) == 0
    assert shared([(0, 100)], [(1, 2), (3, 5)]) == 3
