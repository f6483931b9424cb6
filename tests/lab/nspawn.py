"""A Debian that boots its own systemd in a container without a network, with this checkout's packages bound read-only.

Building the root takes a minute and the network, so it is kept, by release, under the temporary directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

import peerllm

RELEASE, PYTHON = "bookworm", (3, 11)
# The last three: for services of users, and so that the bus and logind know whom a service runs as and what it may.
PACKAGES = "systemd,systemd-sysv,dbus,python3,libpam-systemd,libnss-systemd,polkitd"
BUILD_S, BOOT_S, HALT_S, COMMAND_S = 600, 90, 60, 300
INSTALLED = "/opt/peerllm"  # in the container: an environment that everybody may read
_MAKE_VENV = (
    f"python3 -m venv --without-pip {INSTALLED} && cp /mnt/peerllm.pth {INSTALLED}/lib/python3.11/site-packages/"
)


def why_not() -> str:
    """Why there can be no container here; "" if there can."""
    if os.geteuid():
        return "needs root"
    if missing := [tool for tool in ("debootstrap", "systemd-nspawn", "nsenter") if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)} (apt-get install debootstrap systemd-container)"
    if sys.version_info[:2] != PYTHON:
        return f"the packages bound into {RELEASE} must be for its Python {PYTHON[0]}.{PYTHON[1]}"
    return ""


def built_root() -> Path:
    """A root directory to copy from; RuntimeError if it cannot be built, as without the archive's servers."""
    kind = hashlib.sha256(PACKAGES.encode()).hexdigest()[:8]
    cache = Path(tempfile.gettempdir()) / f"peerllm-lab-{RELEASE}-{kind}"
    if (cache / "etc/os-release").exists() and (cache / ".complete").exists():
        return cache
    shutil.rmtree(cache, ignore_errors=True)
    argv = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(cache)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BUILD_S, check=False)
    if done.returncode:
        shutil.rmtree(cache, ignore_errors=True)
        raise RuntimeError(f"debootstrap: {(done.stdout + done.stderr).strip()[-500:]}")
    (cache / ".complete").touch()
    return cache


class Container:
    """One machine: `boot` it, `run` commands in it, `halt` it; what is on its disk stays from boot to boot."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--reflink=auto", f"{built_root()}/.", str(root)], check=True, timeout=BUILD_S)
        root.chmod(0o755)
        self._binds: list[str] = []
        paths = [self._bound(Path(peerllm.__file__).parent.parent, "/mnt/source")]
        places = [
            Path(one) for one in dict.fromkeys((sysconfig.get_path("purelib"), *sys.path)) if "site-packages" in one
        ]
        paths += [self._bound(place, f"/mnt/packages{number}") for number, place in enumerate(places)]
        (root / "mnt/peerllm.pth").write_text("".join(f"{path}\n" for path in paths))
        for path in [*(root / one.split(":")[1].lstrip("/") for one in self._binds)]:
            path.mkdir(parents=True, exist_ok=True)

    def _bound(self, host: Path, inside: str) -> str:
        self._binds.append(f"{host}:{inside}")
        return inside

    def boot(self) -> None:
        """Returns when its systemd has started everything."""
        argv = ["systemd-nspawn", "-D", str(self.root), "--boot", "--register=no", "--keep-unit", "--private-network",
                "--machine=peerllm-lab", "--quiet", *(f"--bind-ro={one}" for one in self._binds)]  # fmt: skip
        with (self.root.parent / "console.txt").open("ab") as console:
            self._nspawn = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        deadline = time.monotonic() + BOOT_S
        while time.monotonic() < deadline and self._nspawn.poll() is None:
            if children := psutil.Process(self._nspawn.pid).children():
                self._leader = children[0].pid
                with contextlib.suppress(AssertionError, subprocess.SubprocessError):
                    if self.run("systemctl", "is-system-running", "--wait", check=False).strip() in (
                        "running",
                        "degraded",
                    ):
                        break
            time.sleep(0.1)
        else:
            raise AssertionError(f"it did not boot:\n{self.console()}")
        if not (self.root / INSTALLED.lstrip("/")).exists():
            self.run("sh", "-c", _MAKE_VENV)

    def run(self, *argv: str, check: bool = True, timeout_s: float = COMMAND_S) -> str:
        """Standard output of a command in the container."""
        line = ["nsenter", "-t", str(self._leader), "-a", "--", *argv]
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def peerllm(self, *arguments: str, check: bool = True) -> str:
        return self.run(f"{INSTALLED}/bin/python", "-m", "peerllm", *arguments, check=check)

    def console(self) -> str:
        return (self.root.parent / "console.txt").read_text(errors="replace")[-3000:]

    def halt(self) -> None:
        """Shut down as a machine that is switched off; killed if it does not."""
        nspawn, self._nspawn = self._nspawn, None
        if nspawn is None:
            return
        if nspawn.poll() is None:
            nspawn.terminate()  # which nspawn hands on as a request to power off
            try:
                nspawn.wait(HALT_S)
            except subprocess.TimeoutExpired:
                nspawn.kill()
                nspawn.wait(HALT_S)

    def cut_power(self) -> None:
        """End everything in it at once, as a power cut does: its first process takes the others with it."""
        nspawn, self._nspawn = self._nspawn, None
        if nspawn is not None:
            os.kill(self._leader, signal.SIGKILL)
            nspawn.wait(HALT_S)


def properties(container: Container, *names: str) -> dict[str, str]:
    """Of the service."""
    lines = container.run("systemctl", "show", "peerllm.service", f"--property={','.join(names)}").splitlines()
    return dict(line.split("=", 1) for line in lines)
