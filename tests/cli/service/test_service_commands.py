"""`peerllm service` with a systemctl that keeps books; tests/lab/test_service_lab.py has a real systemd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peerllm.cli.device import write_daemon_file
from peerllm.cli.main import main
from peerllm.cli.service import service_commands, service_manager, unit_files
from peerllm.cli.service.unit_files import MARK, TEMPLATES, UnitFiles, check_readable, quoted
from peerllm.errors import BadInputError

SYSTEMCTL = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
*show*) cat {state} ;;
*enable\\ peerllm*) echo UnitFileState=enabled >> {state} ;;
*restart*)
    if [ -e {fails} ]; then echo "Job for peerllm.service failed" >&2; exit 1; fi
    printf 'ActiveState=active\\nMainPID=77\\n' >> {state} ;;
*disable*) printf 'UnitFileState=\\nActiveState=failed\\nMainPID=0\\n' >> {state} ;;
esac
"""


class Systemd:
    """The files of one user's services, and what systemctl was asked for."""

    def __init__(self, folder: Path) -> None:
        self.log, self.state, self.fails = folder / "log", folder / "state", folder / "fails"
        self.state.touch()
        self.units = folder / "config" / "systemd" / "user"

    def asked(self) -> list[str]:
        """Since it was last looked at, without questions."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.removeprefix("--user --no-pager ") for line in lines if " show " not in line]


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    made, path = Systemd(tmp_path), tmp_path / "bin" / "systemctl"
    path.parent.mkdir()
    path.write_text(SYSTEMCTL.format(log=made.log, state=made.state, fails=made.fails))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(service_manager, "RUNS", tmp_path)
    monkeypatch.setattr(service_manager, "LINGERING", tmp_path / "linger")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return made


def test_install_writes_enables_and_starts_and_a_second_one_changes_nothing(
    systemd: Systemd, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["service", "install", "--", "--name", "50 % of $HOME", "--memory", "4GB"]
    assert main(argv) == 0
    unit = systemd.units / "peerllm.service"
    text = unit.read_text()
    assert text.startswith(MARK)
    start = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    assert start == f'ExecStart={sys.executable} -P -m peerllm up --name "50 %% of $$HOME" --memory 4GB'
    assert systemd.asked() == ["daemon-reload", "enable peerllm.service", "restart peerllm.service"]
    said = capsys.readouterr().out
    assert f"wrote {unit}" in said and "started it" in said and "loginctl enable-linger" in said
    assert main(argv) == 0
    assert systemd.asked() == [] and "nothing was changed" in capsys.readouterr().out
    assert main(["service", "install"]) == 0  # other options
    assert systemd.asked() == ["daemon-reload", "restart peerllm.service"]
    assert "4GB" not in unit.read_text()


def test_uninstall_takes_only_what_install_wrote(systemd: Systemd, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["service", "install", "--with", "cuda", "--with", "lan-only"]) == 0
    own = systemd.units / "peerllm.service.d" / "jetson.conf"  # by its name it could be ours
    own.write_text("[Service]\nNice=5\n")
    assert main(["service", "install", "--with", "cuda"]) == 0
    assert {one.name for one in own.parent.iterdir()} == {"cuda.conf", "jetson.conf"}
    systemd.asked()
    assert main(["service", "uninstall"]) == 0
    assert systemd.asked() == ["disable --now peerllm.service", "daemon-reload", "reset-failed peerllm.service"]
    assert [one.name for one in systemd.units.rglob("*")] == ["peerllm.service.d", "jetson.conf"]
    own.unlink()
    assert main(["service", "uninstall"]) == 0 and systemd.asked() == []
    assert "No service was installed" in capsys.readouterr().out
    assert main(["service", "install", "--with", "jetson"]) == 0
    assert main(["service", "uninstall"]) == 0
    assert not list(systemd.units.rglob("*"))


def test_a_unit_of_somebody_else_is_left_alone(systemd: Systemd, capsys: pytest.CaptureFixture[str]) -> None:
    systemd.units.mkdir(parents=True)
    unit = systemd.units / "peerllm.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    assert main(["service", "install"]) == 1
    assert str(unit) in capsys.readouterr().err
    assert main(["service", "uninstall"]) == 0
    assert "by somebody else" in capsys.readouterr().out
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n" and systemd.asked() == []


def test_status_says_what_there_is(systemd: Systemd, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["service", "status"]) == 0
    assert "peerllm service install" in capsys.readouterr().out
    main(["service", "install", "--with", "cuda"])
    with systemd.state.open("a") as state:
        state.write("SubState=running\nNRestarts=3\n")
    capsys.readouterr()
    assert main(["service", "status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "scope": "user", "installed": True, "unit": str(systemd.units / "peerllm.service"), "drop_ins": ["cuda"],
        "enabled": True, "state": "active", "detail": "running", "pid": 77, "restarts": 3,
        "starts_without_login": False,
    }  # fmt: skip
    assert main(["service", "status"]) == 0
    said = capsys.readouterr().out
    assert "with cuda: active (running), starts when you log in" in said
    assert "process 77, started again 3 times" in said and "enable-linger" in said


def test_who_lingers_is_not_told_to(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service_commands, "lingers", lambda: True)
    main(["service", "install"])
    assert "enable-linger" not in capsys.readouterr().out
    main(["service", "status"])
    assert "starts with the machine" in capsys.readouterr().out


def test_what_does_not_go_is_one_line_that_says_what_to_do(
    systemd: Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*argv: str) -> str:
        assert main(["service", *argv]) in (1, 2)
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("peerllm: ")
        return lines[-1]

    assert "leave out --data" in refused("install", "--system", "--", "--data", "/srv/x")
    assert "leave out --data" in refused("install", "--system", "--", "--data=/srv/x")
    systemd.fails.touch()
    assert "journalctl --user -u peerllm" in refused("install")
    data = tmp_path / "data" / "peerllm"
    data.mkdir(parents=True)
    write_daemon_file(data, "http://127.0.0.1:1")  # of this process
    assert f"kill {os.getpid()}" in refused("install")
    with pytest.raises(SystemExit) as wrong:
        main(["service", "install", "--", "--nmae", "x"])
    assert wrong.value.code == 2 and "--nmae" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--system" in refused("status")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert "log in" in refused("install")
    monkeypatch.setattr(service_manager, "RUNS", tmp_path / "nowhere")
    assert "systemd does not run" in refused("status")


def test_a_system_service_needs_an_installation_that_everybody_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_files, "HIDDEN", ())
    monkeypatch.setattr(sys, "executable", "/usr/bin/env")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    place = tmp_path / "opt" / "peerllm"
    place.mkdir(parents=True)
    (place / "__init__.py").touch()
    monkeypatch.setattr(unit_files.peerllm, "__file__", str(place / "__init__.py"))
    for folder in (place, *place.parents):
        if not folder.stat().st_mode & 0o1:
            folder.chmod(0o711)  # pytest's own folders
    check_readable()
    (tmp_path / "opt").chmod(0o700)
    with pytest.raises(BadInputError, match=r"opt is closed.*sudo python3 -m venv /opt/peerllm"):
        check_readable()
    (tmp_path / "opt").chmod(0o755)
    monkeypatch.setattr(unit_files, "HIDDEN", (tmp_path,))
    with pytest.raises(BadInputError, match="cannot read"):
        check_readable()


@pytest.mark.parametrize(
    "argument", ["plain", "two words", "100%", "$HOME", 'a"b', "back\\slash", "", "semi;colon", "it's"]
)
def test_arguments_reach_the_device_as_they_were_typed(argument: str) -> None:
    text = quoted(argument)
    if any(char in " \t\"$%;'\\" for char in argument) or not argument:
        assert text.startswith('"') and text.endswith('"')
        text = text[1:-1]
    # systemd.syntax(7): what it undoes
    assert text.replace("%%", "%").replace("$$", "$").replace('\\"', '"').replace("\\\\", "\\") == argument


systemd_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def analysed(directory: Path, *argv: str) -> str:
    argv = ("systemd-analyze", "--no-pager", *argv)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory)}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@systemd_analyze
@pytest.mark.parametrize("drop_in", ["", *unit_files.DROP_INS])
def test_the_system_unit_is_clean_and_closed(tmp_path: Path, drop_in: str) -> None:
    files = UnitFiles(True, tmp_path)
    files.write(files.wanted(["--name", "50 % of us"], [drop_in] if drop_in else []))
    assert analysed(tmp_path, "verify", str(files.unit)) == ""
    exposed = analysed(tmp_path, "security", "--offline=true", str(files.unit)).splitlines()[-1]
    assert float(exposed.split(":")[1].split()[0]) <= 1.5, exposed


@systemd_analyze
def test_the_templates_are_clean_as_they_lie_there(tmp_path: Path) -> None:
    root = Path(__file__).parents[3] / "systemd"
    assert root.resolve() == TEMPLATES  # one copy, which the package holds
    assert analysed(tmp_path, "verify", str(root / "peerllm.service")) == ""
    assert analysed(tmp_path, "--user", "verify", str(root / "user" / "peerllm.service")) == ""
    exposed = analysed(tmp_path, "security", "--offline=true", str(root / "peerllm.service")).splitlines()[-1]
    assert float(exposed.split(":")[1].split()[0]) <= 1.5, exposed
