"""What can be typed, and what comes of typing it wrong."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from peerllm.cli.main import main
from peerllm.cli.options.argument_types import address, hours, port, size
from peerllm.cli.parser import build_parser, default_data_dir
from peerllm.cli.up import settings_of
from peerllm.errors import BadInputError

COMMANDS = (
    *("up", "demo", "invite", "join", "leave", "run", "stop", "status", "devices", "chat", "models"),
    *("plan", "simulate", "bench", "pause", "resume", "limits"),
)
WITHOUT_DATA = ("demo", "simulate")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4_000_000_000),
        ("512MB", 512_000_000),
        ("1.5GiB", 3 * 2**29),
        ("1000000", 1_000_000),
        ("1000 kb", 1_000_000),
        ("2gib", 2**31),
        ("1TB", 10**12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 XB", "1e9", "4GB4", "nan", "inf", "4,5GB", "٣GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        size(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1", "'1' is 1 byte, too little to lend; write 1GB if you mean gigabytes"),
        ("16", "'16' is 16 bytes, too little to lend; write 16GB if you mean gigabytes"),
        ("999999", "'999999' is 999999 bytes, too little"),
        ("0", "'0' is 0 bytes, too little to lend; write it like 4GB or 512MB"),
        ("999KB", "'999KB' is 999000 bytes, too little to lend; write it like 4GB or 512MB"),
    ],
)
def test_a_size_that_lends_nothing_is_refused_with_what_may_be_meant(text: str, told: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        size(text)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:1", ("a", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("1.2.3.4:80", ("1.2.3.4", 80)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert address(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20-8", (1200, 480)),
        ("20:30-7:05", (1230, 425)),
        ("0-24", (0, 1440)),
        ("8-24", (480, 1440)),
        ("always", (0, 1440)),
    ],
)
def test_hours(text: str, expected: tuple[int, int]) -> None:
    assert hours(text) == expected


@pytest.mark.parametrize(
    "text", ["", "20", "20-", "8-8", "25-8", "8-24:30", "8:60-9", "-1-5", "a-b", "8.5-9", "20-8-9"]
)
def test_what_are_no_hours(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="hours"):
        hours(text)


@pytest.mark.parametrize(
    ("option", "text", "field", "expected"),
    [
        ("--memory", "free", "memory_bytes", 0), ("--memory", "4GB", "memory_bytes", 4 * 10**9),
        ("--threads", "all", "threads", 0), ("--threads", "2", "threads", 2),
        ("--battery", "off", "battery_percent", 0), ("--battery", "30", "battery_percent", 30),
        ("--hot", "off", "hot_celsius", 0), ("--hot", "90", "hot_celsius", 90),
    ],
)  # fmt: skip
def test_limits_of_a_device(option: str, text: str, field: str, expected: float) -> None:
    given = settings_of(build_parser().parse_args(["up", option, text])).given_limits
    assert given == {**dict.fromkeys(given), field: expected}


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--battery", "0"),
        ("--battery", "100"),
        ("--battery", "30%"),
        ("--hot", "20"),
        ("--hot", "nan"),
        ("--threads", "0"),
    ],
)
def test_what_is_no_limit_of_a_device(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("up", "limits"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, option, text])
        assert option in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a", "a:", ":1", "a:0", "a:65536", "::1:80", "a:-1", "a:1x", "[]:1", ""])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        address(text)


@pytest.mark.parametrize("text", ["-1", "65534", "x", "", "1.0"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        port(text)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["up", "--fly"],
        ["up", "--memory", "much"],
        ["up", "--port", "70000"],
        ["up", "--threads", "0"],
        ["up", "--api", "x"],
        ["up", "--peer", "x:0"],
        ["join"],
        ["run"],
        ["run", "m", "--objective", "fun"],
        ["run", "m", "--slots", "-1"],
        ["run", "m", "--schedule", "fast"],
        ["run", "m", "--quantize", "int2"],
        ["run", "m", "--activations", "int4"],
        ["plan", "m", "--activations", "no"],
        ["demo", "--devices", "0"],
        ["demo", "--devices", "9"],
        ["demo", "--data", "x"],
        ["status", "extra"],
        ["chat", "--temperature", "hot"],
        ["chat", "--temperature", "nan"],
        ["chat", "--max-tokens", "0"],
        ["status", "--jso"],
    ],
)
def test_wrong_usage_is_2_with_a_usage_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: peerllm")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert ("--data" in capsys.readouterr().out) == (command not in WITHOUT_DATA)


def test_every_option_of_up(tmp_path: Path) -> None:
    settings = settings_of(
        build_parser().parse_args(
            [
                "up",
                "--name",
                "kitchen",
                "--data",
                str(tmp_path),
                "--port",
                "0",
                "--api",
                "[::1]:0",
                "--memory",
                "4GB",
                "--threads",
                "2",
                "--peer",
                "a:1",
                "--peer",
                "[fe80::1]:2",
                "--in-process",
                "--no-mdns",
                "--loopback",
            ]
        )
    )
    assert (settings.name, settings.data_dir, settings.port) == ("kitchen", tmp_path, 0)
    assert (settings.api_host, settings.api_port, settings.memory_bytes, settings.threads) == ("::1", 0, 4 * 10**9, 2)
    assert settings.peers == (("a", 1), ("fe80::1", 2))
    assert settings.in_process
    assert not settings.mdns
    assert settings.hosts == ("127.0.0.1", "::1")


def test_up_needs_no_option() -> None:
    settings = settings_of(build_parser().parse_args(["up"]))
    assert settings.name
    assert (settings.port, settings.api_host, settings.api_port, settings.memory_bytes) == (
        8643,
        "127.0.0.1",
        8642,
        None,
    )


def test_a_device_for_this_machine_only_speaks_no_mdns() -> None:
    assert settings_of(build_parser().parse_args(["up"])).mdns
    assert not settings_of(build_parser().parse_args(["up", "--no-mdns"])).mdns
    alone = settings_of(build_parser().parse_args(["up", "--loopback"]))
    assert not alone.mdns and alone.hosts == ("127.0.0.1", "::1")


@pytest.mark.parametrize("name", ["x" * 64, "a\nb", "\x1b[31m"])
def test_names_that_cannot_be_shown(name: str) -> None:
    with pytest.raises(BadInputError, match="--name"):
        settings_of(build_parser().parse_args(["up", "--name", name]))


def test_the_data_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "peerllm"
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    assert default_data_dir() == Path.home() / ".local" / "share" / "peerllm"


def test_commands_start_without_what_they_do_not_need() -> None:
    code = (
        "import sys, peerllm.cli.main as m, peerllm.cli.look, peerllm.cli.chat, peerllm.cli.household\n"
        "m.build_parser()\n"
        "print([one for one in ('torch', 'transformers', 'aiohttp', 'tokenizers', 'numpy') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
