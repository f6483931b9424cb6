"""systemd as the commands reach it: `systemctl` of the machine or of this user."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from pathlib import Path

from peerllm.cli.service.unit_files import UNIT
from peerllm.errors import BadInputError, UnavailableError

RUNS = Path("/run/systemd/system")  # there where systemd is what manages services
PASSWD = Path("/etc/passwd")
LINGERING = Path("/var/lib/systemd/linger")
TIMEOUT_S = 360.0  # starting waits until the device is ready, the first time until it has measured itself
SHOWN = ("LoadState", "UnitFileState", "ActiveState", "SubState", "MainPID", "NRestarts", "Result")


class ServiceManager:
    """UnavailableError or BadInputError says why it cannot be used by this user."""

    def __init__(self, system: bool) -> None:
        self._scope = () if system else ("--user",)
        if shutil.which("systemctl") is None or not RUNS.is_dir():
            raise UnavailableError(
                "systemd does not run on this machine; let what starts services here run: peerllm up"
            )
        again = f"sudo {sys.executable} -m peerllm service"
        if not system and os.geteuid() == 0:
            raise BadInputError(f"root needs no service of its own; for the whole machine type: {again} ... --system")
        if not system and not os.environ.get("XDG_RUNTIME_DIR"):
            raise UnavailableError(
                "no service manager runs for this user here (XDG_RUNTIME_DIR is not set): log in, instead of using su; "
                f"or make it a service of the whole machine: {again} install --system"
            )

    def run(self, *arguments: str) -> str:
        """What systemctl prints; UnavailableError with its own words if it fails."""
        argv = ["systemctl", *self._scope, "--no-pager", *arguments]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"`{' '.join(argv)}` does not end; see: {self.journal}") from error
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise UnavailableError(f"`{' '.join(argv)}` failed ({said}); see: {self.journal}")
        return done.stdout

    def shown(self) -> dict[str, str]:
        """What systemd knows of the unit, SHOWN by name."""
        lines = self.run("show", UNIT, f"--property={','.join(SHOWN)}").splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    @property
    def journal(self) -> str:
        return f"journalctl {'--user ' if self._scope else ''}-u peerllm"


def bus_knows_user() -> bool:
    """Whether logind may be asked by the system's service: dbus-daemon refuses users that exist while they run only."""
    if shutil.which("dbus-daemon") is None or shutil.which("dbus-broker") is not None:
        return True
    return any(
        line.startswith("peerllm:") for line in PASSWD.read_text(encoding="utf-8", errors="replace").splitlines()
    )


def lingers() -> bool:
    """Whether this user's services start with the machine, and not only when the user logs in."""
    return (LINGERING / getpass.getuser()).exists()
