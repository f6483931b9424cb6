"""Commands against a device whose household is scripted: what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peerllm.api.server import ApiServer
from peerllm.cli import chat, terminal
from peerllm.cli.device import LocalDevice, starting, write_daemon_file
from peerllm.cli.main import main
from peerllm.cli.progress import show_progress
from peerllm.daemon.settings import Settings
from peerllm.daemon.status.status import starting_status
from peerllm.errors import EngineError, OverloadedError
from tests.api.fake import WEIGHTS, FakeHousehold, deployment, make_model_dir

Run = Callable[..., tuple[int, str, str]]


class Served:
    """The API over a fake household, in a loop of its own thread, with the files that a running device writes."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api under test")
        self._thread.start()
        self.household = self.on_loop(self._make(directory))

    async def _make(self, directory: Path) -> FakeHousehold:
        household = FakeHousehold(make_model_dir(directory / "model"))
        self._server = ApiServer(household, "127.0.0.1", 0, self.data, in_process=True)
        await self._server.start()
        write_daemon_file(self.data, self._server.url)
        return household

    def on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def close(self) -> None:
        self.on_loop(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path)
    yield one
    one.close()


@pytest.fixture
def peerllm(device: Served, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(command: str, *args: str) -> tuple[int, str, str]:
        code = main([command, "--data", str(device.data), *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_pause_and_resume_say_what_follows(peerllm: Run, device: Served) -> None:
    code, out, _ = peerllm("pause")
    assert code == 0 and "peerllm resume" in out and device.household.owner.paused
    code, out, _ = peerllm("resume")
    assert (code, out, device.household.owner.paused) == (0, "Resumed: this device lends again.\n", False)
    device.household.leaving = "paused: on battery, 24 %"
    assert peerllm("resume")[1] == "Resumed, but it still lends nothing: paused: on battery, 24 %\n"


def test_limits_are_shown_and_changed_one_by_one(peerllm: Run, device: Served) -> None:
    before = device.household.owner
    assert peerllm("limits")[1].splitlines()[1].startswith("memory      what is free")
    assert device.household.owner == before
    argv = ("--memory", "4GB", "--threads", "2", "--hours", "20:30-8", "--battery", "30", "--hot", "90")
    code, out, _ = peerllm("limits", *argv)
    assert code == 0
    for text in ("at most 4.00 GB", "processors  2", "from 20:30 to 8:00", "down to 30 %", "below 90 °C", "Now: lends"):
        assert text in out
    found = json.loads(peerllm("limits", "--hot", "off", "--json")[1])
    assert (found["memory_bytes"], found["hours"], found["hot_celsius"]) == (4_000_000_000, [1230, 480], None)
    peerllm("limits", "--memory", "free", "--threads", "all", "--hours", "always", "--battery", "off")
    assert device.household.owner == replace(before, battery_percent=None)


def test_a_device_that_leaves_says_why_in_the_table(peerllm: Run, device: Served) -> None:
    device.household.devices[1]["leaving"] = "paused: on battery, 24 %"
    assert re.search(r"mini-pc +paused: on battery, 24 % ", peerllm("status")[1])


def test_invite_ends_with_the_code(peerllm: Run) -> None:
    code, out, _ = peerllm("invite")
    assert code == 0
    assert out.split()[-1] == "K7-4PQ9MX"
    code, out, _ = peerllm("invite", "--json")
    hosts = ["192.168.1.7", "fd00::7", "fe80::7"]
    assert json.loads(out) == {"code": "K7-4PQ9MX", "port": 8645, "hosts": hosts, "expires_s": 120}


@pytest.mark.parametrize(
    ("port", "at"), [(8645, ["192.168.1.7", "fd00::7"]), (9002, ["192.168.1.7:9002", "[fd00::7]:9002"])]
)
def test_invite_says_where_this_device_is_reached(peerllm: Run, device: Served, port: int, at: list[str]) -> None:
    device.household.pairing_port = port
    typed = [line.split() for line in peerllm("invite")[1].splitlines() if "--at" in line]
    assert typed == [["peerllm", "join", "K7-4PQ9MX", "--at", place] for place in at]
    for words in typed:
        assert peerllm("join", *words[2:])[0] == 0
    places = [call[2] for call in device.household.calls if call[0] == "join"]
    assert places == [("192.168.1.7", port), ("fd00::7", port)]


@pytest.mark.parametrize("host", ["192.168.1.7", "laptop.local", "fe80::1"])
def test_join(peerllm: Run, device: Served, host: str) -> None:
    bracketed = f"[{host}]" if ":" in host else host
    for at in (host, bracketed, f"{bracketed}:8645"):
        assert peerllm("join", "K7-4PQ9MX", "--at", at) == (0, "Joined the household of laptop.\n", "")
    assert peerllm("join", "K7-4PQ9MX")[0] == 0
    assert device.household.calls == [*[("join", "K7-4PQ9MX", (host, 8645))] * 3, ("join", "K7-4PQ9MX", None)]


def test_a_wrong_code_is_one_line(peerllm: Run) -> None:
    assert peerllm("join", "wrong") == (1, "", "peerllm: the code is wrong; two tries are left\n")


def test_leave_and_stop(peerllm: Run, device: Served) -> None:
    assert peerllm("leave")[0] == 0
    assert peerllm("stop", "builtin") == (0, "Stopped builtin.\n", "")
    assert peerllm("stop", "other") == (1, "", "peerllm: no model 'other' is served\n")
    assert device.household.calls[0] == ("leave",)


def test_a_device_is_put_out(peerllm: Run, device: Served) -> None:
    code, said, err = peerllm("remove", "jetson")
    assert (code, err) == (0, "") and said.startswith("jetson is no longer of this household")
    assert device.household.calls == [("remove", "jetson")]


def test_status_as_json_is_the_status(peerllm: Run, device: Served) -> None:
    code, out, _ = peerllm("status", "--json")
    assert (code, json.loads(out)) == (0, {**device.household.status(), "asking": []})
    assert json.loads(peerllm("devices", "--json")[1]) == device.household.devices


def test_status_as_text(peerllm: Run) -> None:
    code, out, _ = peerllm("status")
    assert code == 0
    assert "laptop (this one)" in out
    assert "builtin: serving, coordinated by laptop, epoch 1" in out
    bars = [line for line in out.splitlines() if "█" in line]
    assert len(bars) == 3
    drawn = [line.split()[2] for line in bars]
    assert all("█" in column for column in zip(*drawn, strict=True)), "some layer is nobody's"


def test_status_says_that_a_device_starts(peerllm: Run, device: Served) -> None:
    starting = starting_status("0" * 64, Settings(device.data, "laptop"), "measuring how fast this machine computes")
    device.household.devices, device.household.deployments = starting["devices"], []
    code, out, err = peerllm("status")
    assert (code, err) == (0, "")
    assert "laptop (this one)  starting  " in out
    assert "laptop: is measuring how fast this machine computes\n" in out
    assert "0 B" not in out and "No model is served" not in out
    told = json.loads(peerllm("status", "--json")[1])
    assert starting.keys() | {"asking"} == told.keys() | {"links", "network"}


def test_status_tells_memory_lent_and_used_and_the_context(peerllm: Run, device: Served) -> None:
    out = peerllm("status")[1]
    head, first = (re.split(r"  +", line) for line in out.splitlines()[2:4])
    told = dict(zip(head, first, strict=False))  # where it computes is not said
    assert (told["MEMORY"], told["LENT"], told["USED"]) == ("8.00 GB", "20.0 MB", "12.0 MB")
    assert told["ENGINE ITSELF"] == "100 MB"
    assert "context: 1,024 tokens, prompt and answer together; 4 at once\n" in out
    assert "context: 1,024 tokens" in peerllm("run", "builtin")[1]


def test_status_tells_how_far_a_download_is(peerllm: Run, device: Served) -> None:
    loading = deployment(state="planning") | {"plan": None, "message": "downloading small, 2.5 GB: 40%", "context": 0}
    device.household.deployments = [loading]
    assert "builtin: planning, downloading small, 2.5 GB: 40%, coordinated by laptop" in peerllm("status")[1]


def test_troubles_and_strangers_are_told(peerllm: Run, device: Served) -> None:
    device.household.devices[2].update(state="offline", problem="cannot be reached")
    device.household.nearby = [{"name": "guest\x1b[31m"}]
    out = peerllm("devices")[1]
    assert "jetson: cannot be reached\n" in out
    assert "Nearby, not of this household: guest[31m\n" in out


def test_status_without_models_and_while_failing(peerllm: Run, device: Served) -> None:
    device.household.deployments = []
    assert "peerllm run builtin" in peerllm("status")[1]
    device.household.deployments = [{**deployment(state="waiting"), "plan": None, "reason": "jetson is gone"}]
    assert "waiting" in (out := peerllm("status")[1])
    assert "(jetson is gone)" in out


def test_names_cannot_steer_the_terminal(peerllm: Run, device: Served) -> None:
    device.household.devices[1]["name"] = "evil\x1b]0;title\x07\x1b[31m\u202e"
    device.household.deployments = []
    out = peerllm("status")[1]
    assert "\x1b" not in out
    assert "\x07" not in out


def test_run(peerllm: Run, device: Served) -> None:
    code, out, err = peerllm(
        "run",
        "builtin",
        "--context",
        "512",
        "--slots",
        "2",
        "--objective",
        "throughput",
        "--private",
        "--schedule",
        "sequential",
    )
    assert code == 0
    assert "█" in out
    assert err.splitlines() == ["planning: planning over 3 devices", "loading: loading"]
    options = device.household.runs[0]
    assert options.schedule == "sequential"
    assert (options.model, options.context, options.slots, options.objective, options.private) == (
        "builtin",
        512,
        2,
        "throughput",
        True,
    )


def test_percentages_do_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    show_progress([{"state": "loading", "message": f"hashing: {done}%"} for done in range(100)])
    assert capsys.readouterr().err == "loading: hashing: 0%\n"


def test_run_takes_a_directory_from_where_it_is_typed(
    peerllm: Run, device: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert peerllm("run", "model")[0] == 0
    assert peerllm("run", "org/name")[0] == 0
    assert [one.model for one in device.household.runs] == [str(tmp_path / "model"), "org/name"]


def test_run_that_does_not_fit_says_how_much_is_missing(peerllm: Run) -> None:
    code, out, err = peerllm("run", "huge")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "peerllm: huge needs 4.0 GB more than the household lends"


def test_unknown_models(peerllm: Run, device: Served) -> None:
    assert peerllm("run", "unknown") == (1, "", "peerllm: no model 'unknown'\n")


def test_run_passes_on_how_to_round_the_weights_and_says_how_they_are(peerllm: Run, device: Served) -> None:
    assert f"\nweights: {WEIGHTS}\n" in peerllm("run", "builtin")[1]
    assert peerllm("run", "builtin", "--quantize", "int4")[0] == 0
    assert [one.quantize for one in device.household.runs] == ["auto", "int4"]
    assert f"\nweights: {WEIGHTS}\n" in peerllm("status")[1]


@pytest.mark.parametrize("also", [[], ["--quantize", "none"], ["--activations", "exact"]])
def test_exact_computes_in_float32_and_rounds_nothing(peerllm: Run, device: Served, also: list[str]) -> None:
    assert peerllm("run", "builtin", "--exact", *also)[0] == 0
    (options,) = device.household.runs
    assert (options.dtype, options.quantize, options.activations) == ("float32", "none", "exact")


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("also", [("--quantize", "int8"), ("--quantize", "int4"), ("--activations", "int8")])
def test_exact_contradicts_what_rounds(peerllm: Run, device: Served, command: str, also: tuple[str, str]) -> None:
    told = f"peerllm: --exact rounds nothing: leave out {' '.join(also)}\n"
    assert peerllm(command, "builtin", "--exact", *also) == (2, "", told)
    assert not device.household.runs


def test_run_passes_on_how_activations_travel_and_says_which_do(peerllm: Run, device: Served) -> None:
    assert "int8" not in peerllm("run", "builtin")[1]
    (served,) = device.household.deployments
    served["plan"]["activations"] = ["exact", "int8"]
    out = peerllm("run", "builtin", "--activations", "int8")[1]
    assert [one.activations for one in device.household.runs] == ["auto", "int8"]
    assert "activations travel as int8 to jetson: the link is the bottleneck\n" in out
    assert "activations travel as int8 to jetson" in peerllm("status")[1]


def test_chat_streams_the_answer(peerllm: Run, device: Served) -> None:
    code, out, _ = peerllm("chat", "hi", "--system", "be brief", "--temperature", "0", "--max-tokens", "50")
    assert (code, out) == (0, device.household.reply + "\n")
    request = device.household.requests[0]
    prompt = device.household.tokenizer.decode(list(request.prompt), skip_special_tokens=False)
    assert prompt == "<s><|system|>be brief<|end|>\n<|user|>hi<|end|>\n<|assistant|>"
    assert (request.max_tokens, request.sampling.temperature) == (50, 0.0)


def test_what_the_model_thinks_goes_to_standard_error(peerllm: Run, device: Served) -> None:
    directory = device.household.model.model_dir
    assert directory is not None
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}{# </think> #}")
    device.household.reply = "<think>\na \x1b[2Jgreeting\n</think>\n\nHello"
    assert peerllm("chat", "hi") == (0, "Hello\n", "a [2Jgreeting\n\n")


def test_chat_says_what_an_answer_waits_for(peerllm: Run, device: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, since its output is no terminal here."""
    monkeypatch.setattr("peerllm.api.core.own_answer.LOOK_S", 0.01)
    household, model = device.household, device.household.model
    household.middle = asyncio.Event()

    tell = terminal.tell

    def told(text: str) -> None:
        tell(text)
        household.served = [model]
        device.on_loop(set_event(household.middle))

    monkeypatch.setattr(terminal, "tell", told)
    household.served = [replace(model, message="mini-pc is gone; laptop takes over its layers")]
    code, out, err = peerllm("chat", "hi")
    assert (code, out, err) == (0, household.reply + "\n", "mini-pc is gone; laptop takes over its layers\n")


async def set_event(event: asyncio.Event) -> None:
    event.set()


def test_a_note_goes_away_when_the_answer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Note:
        def show(self, text: str) -> None:
            shown.append(text)

    def pieces(device: Any, body: Any, messages: Any, comment: Callable[[str], None], _: Any) -> Iterator[str]:
        yield "a"
        comment("mini-pc is gone")
        yield "b"
        comment("jetson is gone")
        comment("working")

    monkeypatch.setattr(chat, "PassingNote", Note)
    monkeypatch.setattr(chat, "answer_pieces", pieces)
    assert chat._say(None, {}, []) == "ab"  # type: ignore[arg-type]
    assert shown == ["", "mini-pc is gone", "", "jetson is gone", "", ""]


def test_chat_as_json(peerllm: Run, device: Served) -> None:
    answer = json.loads(peerllm("chat", "hi", "--json")[1])
    assert answer["choices"][0]["message"]["content"] == device.household.reply


def test_chat_that_breaks_off_fails(peerllm: Run, device: Served) -> None:
    device.household.error_midway = EngineError("the engine on jetson died")
    code, out, err = peerllm("chat", "hi")
    assert (code, out) == (1, "Hell\n")
    assert re.fullmatch(r"peerllm: the engine on jetson died \(request req_[0-9a-f]{12}\)\n", err)
    device.household.error_midway, device.household.error_at_once = None, OverloadedError("the queue is full")
    assert peerllm("chat", "hi") == (1, "\n", "peerllm: the queue is full\n")


def test_tokens_of_persons(peerllm: Run, device: Served) -> None:
    code, out, _ = peerllm("token", "add", "anna")
    given = out.split()[-1]
    assert code == 0 and "anna" in out and len(given) > 30
    assert given not in (device.data / "persons.json").read_text()
    assert "anna" in peerllm("token", "list")[1] and given not in peerllm("token", "list")[1]
    code, _, err = peerllm("token", "add", "ANNA")
    assert (code, "peerllm token revoke ANNA" in err, "request" in err) == (1, True, False)
    assert peerllm("token", "add", "a/b")[0] == 1
    assert peerllm("token", "add")[0] == peerllm("token", "list", "anna")[0] == 2
    assert peerllm("token", "revoke", "Anna")[0] == 0
    assert "Nobody" in peerllm("token", "list")[1]
    assert peerllm("token", "revoke", "anna")[0] == 1


def test_chat_without_a_model_says_what_to_do(peerllm: Run, device: Served) -> None:
    device.household.served = []
    code, _, err = peerllm("chat", "hi")
    assert (code, "peerllm run builtin" in err) == (1, True)


def test_answers_cannot_steer_the_terminal(peerllm: Run, device: Served) -> None:
    device.household.reply = "a\x1b[2Jb\r\x07c\n\td"
    assert peerllm("chat", "hi")[1] == "a[2Jbc\n\td\n"


def test_a_conversation_remembers(peerllm: Run, device: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["hi", "", "again"])

    def answer(_: str = "") -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    device.household.reply = "yes"
    code, out, _ = peerllm("chat")
    assert (code, out.split()) == (0, ["yes", "yes"])
    last = device.household.tokenizer.decode(list(device.household.requests[-1].prompt), skip_special_tokens=False)
    assert last == "<s><|user|>hi<|end|>\n<|assistant|>yes<|end|>\n<|user|>again<|end|>\n<|assistant|>"


@pytest.fixture
def typing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What a person types at a terminal, line by line; an exception is raised instead. Then comes Ctrl-D."""

    def types(*lines: str | type[BaseException]) -> None:
        script = iter(lines)

        def answer(_: str = "") -> str:
            line = next(script, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)

    return types


def test_a_conversation_explains_itself_and_ends_with_exit(
    peerllm: Run, device: Served, typing: Callable[..., None]
) -> None:
    typing("/help", "hi", " /EXIT ", "never said")
    device.household.reply = "yes"
    code, out, err = peerllm("chat")
    assert (code, err, len(device.household.requests)) == (0, "", 1)
    greeting, *explained, answer = out.splitlines()
    assert "/help" in greeting and "/exit" in greeting and "Ctrl-D" in greeting
    assert [line.split()[0] for line in explained[:3]] == ["/help", "/exit", "Ctrl-C"]
    assert answer == "yes"


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_ctrl_d_leaves(peerllm: Run, typing: Callable[..., None]) -> None:
    typing(KeyboardInterrupt, "/help")
    code, out, err = peerllm("chat")
    assert (code, err) == (0, "")
    assert out.count("Leave with /exit or Ctrl-D") == 1 and "/help   this list" in out


def test_ctrl_c_stops_the_answer_and_the_model_forgets_the_question(
    peerllm: Run, device: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer never ends: only the signal can let the second question be asked."""
    household, script = device.household, iter(["tell me everything", "hi"])
    household.endless = True
    written = []

    def typed(_: str = "") -> str:
        line = next(script, None)
        if line is None:
            raise EOFError
        if line == "hi":
            household.endless, household.reply = False, "yes"
            assert device.on_loop(asyncio.wait_for(household.closed.wait(), 10)), "the device goes on writing"
        return line

    def seen(text: str) -> str:
        written.append(text)
        if len(written) == 5:
            signal.raise_signal(signal.SIGINT)
        return text

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("peerllm.cli.chat.printable", lambda text: seen(text) if household.requests else text)
    code, out, err = peerllm("chat")
    assert (code, err, out.splitlines()[-1]) == (0, "", "")
    last = household.tokenizer.decode(list(household.requests[-1].prompt), skip_special_tokens=False)
    assert last == "<s><|user|>hi<|end|>\n<|assistant|>"


def test_lines_of_a_file_are_all_for_the_model(
    peerllm: Run, device: Served, typing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    typing("/exit", "/help")
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    device.household.reply = "yes"
    assert peerllm("chat")[1].split() == ["yes", "yes"]


@pytest.mark.parametrize(
    "args",
    [
        ["invite"],
        ["join", "x"],
        ["leave"],
        ["remove", "jetson"],
        ["run", "builtin"],
        ["stop", "builtin"],
        ["status"],
        ["devices", "--json"],
        ["chat", "hi"],
    ],
)
def test_without_a_device_every_command_says_how_to_start_one(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nobody"
    wanted = f"peerllm: no device is running on {nowhere}; start it with: peerllm up --data {nowhere}\n"
    assert main([args[0], "--data", str(nowhere), *args[1:]]) == 1
    assert capsys.readouterr() == ("", wanted)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nowhere.mkdir()
    (nowhere / "token").write_text("x" * 43)
    write_daemon_file(nowhere, f"http://127.0.0.1:{port}")  # of a device that was killed
    assert main([args[0], "--data", str(nowhere), *args[1:]]) == 1
    assert capsys.readouterr() == ("", wanted)


def test_a_device_that_has_not_begun_to_listen_is_waited_for(
    peerllm: Run, device: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looked = []

    def sleep(_: float) -> None:
        looked.append(json.loads((device.data / "daemon.json").read_text())["url"])
        write_daemon_file(device.data, url)

    url = LocalDevice(device.data).url
    monkeypatch.setattr("peerllm.cli.device.time.sleep", sleep)
    (device.data / "daemon.json").unlink()
    with starting(device.data):
        assert peerllm("status")[0] == 0
        assert looked == [""]
        monkeypatch.setattr("peerllm.cli.device.START_S", -1.0)
        write_daemon_file(device.data, "")
        wanted = f"peerllm: the device on {device.data} is still starting; ask again in a moment\n"
        assert peerllm("status") == (1, "", wanted)
    assert not (device.data / "daemon.json").exists()
    assert "no device is running" in peerllm("status")[2]


def test_what_a_device_left_that_was_killed_while_it_started_does_not_count(peerllm: Run, device: Served) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (device.data / "daemon.json").write_text(json.dumps({"url": "", "pid": process.pid}))
    assert "no device is running" in peerllm("status")[2]


def test_who_begins_to_start_leaves_a_running_device_s_file_alone(device: Served, tmp_path: Path) -> None:
    written = {"url": "http://127.0.0.1:1", "pid": os.getppid()}
    (tmp_path / "daemon.json").write_text(json.dumps(written))
    with starting(tmp_path):
        assert json.loads((tmp_path / "daemon.json").read_text()) == written
    assert json.loads((tmp_path / "daemon.json").read_text()) == written


def test_another_program_on_the_port_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text("x" * 43)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

        thread = threading.Thread(target=answer)
        thread.start()
        write_daemon_file(tmp_path, f"http://127.0.0.1:{other.getsockname()[1]}")
        assert main(["status", "--data", str(tmp_path)]) == 1
        thread.join(10)
    assert "something else listens" in capsys.readouterr().err
