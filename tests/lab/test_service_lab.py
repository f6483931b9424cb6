"""The system service under a systemd that boots: installed, killed, stuck, rebooted, taken away again."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.nspawn import INSTALLED, Container, built_root, properties, why_not

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
DATA = "/var/lib/peerllm"
QUESTION = "What are you?"
WAITED_S = 60
# Until a command succeeds; no event of the container reaches the host.
_UNTIL = f"for i in $(seq {WAITED_S * 5}); do if ( {{}} ) >/dev/null 2>&1; then exit 0; fi; sleep 0.2; done; exit 1"


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    if reason := why_not():
        pytest.skip(reason)
    try:
        built_root()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no Debian can be built here: {error}")
    with tempfile.TemporaryDirectory(prefix="peerllm-service-lab-") as directory:
        made = Container(Path(directory) / "root")
        made.boot()
        try:
            yield made
        finally:
            made.halt()


def until(container: Container, condition: str) -> None:
    """A shell condition in the container comes true, within WAITED_S."""
    container.run("sh", "-c", _UNTIL.replace("{}", condition))


def answered(container: Container) -> str:
    """Asked until the model serves."""
    until(container, f"{INSTALLED}/bin/python -m peerllm status --data {DATA} | grep -q 'builtin: serving'")
    return container.peerllm("chat", QUESTION, "--temperature", "0", "--data", DATA)


def etc(container: Container) -> str:
    """All files and links below /etc, with what is in them; some change by themselves."""
    return container.run("sh", "-c", "cd /etc && find . -type l -printf '%p %l\\n' -o -type f -exec md5sum {} + | sort")


@pytest.fixture(scope="module")
def before(container: Container) -> str:
    return etc(container)


@pytest.fixture(scope="module")
def said(container: Container, before: str) -> str:
    """What the model answers once the service was installed and runs it."""
    container.peerllm("service", "install", "--system", "--", "--name", "box & co", "--threads", "1")
    container.peerllm("run", "builtin", "--data", DATA)
    return answered(container)


def test_it_runs_as_a_user_that_may_nothing(container: Container, said: str) -> None:
    assert "peerllm" in said
    state = json.loads(container.peerllm("service", "status", "--system", "--json"))
    assert (state["installed"], state["enabled"], state["state"], state["starts_without_login"]) == (
        True,
        True,
        "active",
        True,
    )
    kernel = container.run("cat", f"/proc/{state['pid']}/status")
    facts = dict(line.split(":\t", 1) for line in kernel.splitlines() if ":\t" in line)
    assert int(facts["Uid"].split()[0]) > 60000 and int(facts["CapEff"], 16) == 0
    assert facts["NoNewPrivs"] == "1" and facts["Seccomp"] == "2"
    assert "box & co" in container.peerllm("status", "--data", DATA)
    mode = container.run("stat", "-c", "%a", "/var/lib/private/peerllm", f"{DATA}/token").split()
    assert mode == ["700", "600"]


def test_to_install_it_again_changes_nothing(container: Container, said: str) -> None:
    pid = properties(container, "MainPID")
    again = container.peerllm("service", "install", "--system", "--", "--name", "box & co", "--threads", "1")
    assert "nothing was changed" in again and properties(container, "MainPID") == pid


def test_it_is_back_with_its_model_after_kill_9(container: Container, said: str) -> None:
    before = properties(container, "NRestarts", "MainPID")
    container.run("systemctl", "kill", "--signal=KILL", "--kill-who=main", "peerllm")
    until(container, f"[ $(systemctl show -P NRestarts peerllm) -gt {before['NRestarts']} ]")
    assert answered(container) == said


def test_a_loop_that_is_stuck_is_ended_and_started_again(container: Container, said: str) -> None:
    """Stopped by a signal, which stops every thread; the watchdog's time is shortened so that the test is short."""
    folder = "/etc/systemd/system/peerllm.service.d"
    script = f"mkdir -p {folder}; printf '[Service]\\nWatchdogSec=2\\n' > {folder}/zz-own.conf; systemctl daemon-reload"
    container.run("sh", "-c", f"{script}; systemctl restart peerllm")
    assert answered(container) == said
    before = properties(container, "NRestarts")
    container.run("systemctl", "kill", "--signal=STOP", "--kill-who=main", "peerllm")
    until(container, f"[ $(systemctl show -P NRestarts peerllm) -gt {before['NRestarts']} ]")
    assert "watchdog" in container.run("journalctl", "-u", "peerllm", "--no-pager", "-o", "cat").lower()
    assert answered(container) == said


@pytest.mark.parametrize("end", ["halt", "cut_power"])
def test_a_machine_that_boots_serves_its_model_without_anybody_logged_in(
    container: Container, said: str, end: str
) -> None:
    getattr(container, end)()
    container.boot()
    assert answered(container) == said
    assert properties(container, "ActiveState")["ActiveState"] == "active"
    if end == "halt":
        farewell = container.run("journalctl", "-b", "-1", "-u", "peerllm", "--no-pager", "-o", "cat")
        assert "stopping" in farewell


def test_a_drop_in_keeps_it_within_the_home(container: Container, said: str) -> None:
    told = container.peerllm("service", "install", "--system", "--with", "lan-only", "--", "--name", "box & co")
    assert "lan-only.conf" in told
    denied = properties(container, "IPAddressDeny", "IPAddressAllow")
    assert (
        set(denied["IPAddressDeny"].split()) == {"0.0.0.0/0", "::/0"} and "192.168.0.0/16" in denied["IPAddressAllow"]
    )
    assert answered(container) == said


def test_a_service_that_cannot_start_says_where_to_look(container: Container, said: str) -> None:
    refused = container.run(
        "sh", "-c", f"{INSTALLED}/bin/python -m peerllm service install --system -- --data /srv 2>&1", check=False
    )
    assert "leave out --data" in refused


def test_uninstall_takes_away_what_install_made_and_nothing_else(container: Container, before: str, said: str) -> None:
    told = container.peerllm("service", "uninstall", "--system")
    assert "lan-only.conf" in told and "stay" in told
    own = container.run(
        "sh", "-c", "cat /etc/systemd/system/peerllm.service.d/zz-own.conf; rm -r /etc/systemd/system/peerllm.service.d"
    )
    assert "WatchdogSec=2" in own
    assert etc(container) == before
    assert properties(container, "LoadState")["LoadState"] == "not-found"
    assert container.run("ls", "/var/lib/private/peerllm").strip()
    assert "No service was installed" in container.peerllm("service", "uninstall", "--system")


def test_before_sleep_it_is_waited_for_where_the_bus_knows_its_user(container: Container, before: str) -> None:
    """dbus-daemon knows no user that exists only while a service runs, so the install says to make one."""
    assert "useradd --system peerllm" in container.peerllm("service", "install", "--system")
    assert "peerllm" not in container.run("systemd-inhibit", "--list", "--no-pager", "--no-legend")
    container.run("sh", "-c", "systemctl stop peerllm; useradd --system peerllm; systemctl start peerllm")
    assert "useradd" not in container.peerllm("service", "install", "--system")
    until(container, "systemd-inhibit --list --no-pager | grep -q 'peerllm.*sleep.*delay'")
    assert json.loads(container.peerllm("status", "--data", DATA, "--json"))["device"]["name"]  # the same data
    container.peerllm("service", "uninstall", "--system")
    assert "peerllm" not in container.run("systemd-inhibit", "--list", "--no-pager", "--no-legend")


def test_a_service_of_one_user_starts_with_the_machine_where_that_user_lingers(container: Container) -> None:
    def ann(*arguments: str) -> str:
        environment = ("env", "-C", "/", "XDG_RUNTIME_DIR=/run/user/1000", "HOME=/home/ann")
        return container.run("runuser", "-u", "ann", "--", *environment, f"{INSTALLED}/bin/python", "-m", "peerllm",
                             *arguments)  # fmt: skip

    container.run("useradd", "--create-home", "--uid", "1000", "ann")
    container.run("systemctl", "start", "user@1000")  # as logging in does
    assert "loginctl enable-linger" in ann("service", "install", "--", "--name", "ann's")
    assert json.loads(ann("service", "status", "--json"))["starts_without_login"] is False
    container.run("loginctl", "enable-linger", "ann")
    assert json.loads(ann("service", "status", "--json"))["starts_without_login"] is True
    ann("run", "builtin")
    container.halt()
    container.boot()
    until(container, "test -e /home/ann/.local/share/peerllm/daemon.json")
    python = f"{INSTALLED}/bin/python -m peerllm status"
    until(container, f"runuser -u ann -- env HOME=/home/ann {python} | grep -q 'builtin: serving'")
    assert "peerllm" in ann("chat", QUESTION, "--temperature", "0")
    assert "stopped and disabled" in ann("service", "uninstall")
    assert not container.run("sh", "-c", "find /home/ann/.config/systemd -type f -o -type l").strip()


def test_the_packages_in_the_container_are_those_of_this_checkout(container: Container) -> None:
    import peerllm

    container.run(
        f"{INSTALLED}/bin/python", "-c", f"import peerllm; assert peerllm.__version__ == {peerllm.__version__!r}"
    )
    assert sys.version_info[:2] == (3, 11)
