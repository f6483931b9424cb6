"""The unit's files: where they go, what install writes into them, and which of those there it wrote before."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peerllm
from peerllm.errors import BadInputError, RefusedError

UNIT = "peerllm.service"
TEMPLATES = Path(peerllm.__file__).resolve().parent / "systemd"
DROP_INS = ("cuda", "jetson", "lan-only")
COMMAND = "/usr/bin/env peerllm up"  # in the templates: install writes this interpreter instead
MARK = "# Written by `peerllm service install`; `peerllm service uninstall` takes it away again.\n"
SYSTEM_DIRECTORY = Path("/etc/systemd/system")
SYSTEM_DATA = Path("/var/lib/peerllm")
HIDDEN = tuple(Path(one) for one in ("/home", "/root", "/run/user", "/tmp", "/var/tmp"))  # noqa: S108  by the sandbox


@dataclass(frozen=True, slots=True)
class UnitFiles:
    """Of the system's service or, where not `system`, of this user's."""

    system: bool
    directory: Path

    @classmethod
    def of(cls, system: bool) -> UnitFiles:
        if system:
            return cls(True, SYSTEM_DIRECTORY)
        base = Path(os.environ.get("XDG_CONFIG_HOME", ""))
        return cls(False, (base if base.is_absolute() else Path.home() / ".config") / "systemd" / "user")

    @property
    def unit(self) -> Path:
        return self.directory / UNIT

    @property
    def drop_ins(self) -> Path:
        return self.directory / f"{UNIT}.d"

    def written(self) -> list[Path]:
        """The files that an install wrote; none that a person or a distribution put there."""
        found = [self.unit, *(self.drop_ins / f"{name}.conf" for name in DROP_INS)]
        return [path for path in found if _marked(path)]

    def wanted(self, options: Sequence[str], drop_ins: Sequence[str]) -> dict[Path, str]:
        """What install writes, for a device that is started with these options of `peerllm up`."""
        template = TEMPLATES / UNIT if self.system else TEMPLATES / "user" / UNIT
        text = template.read_text(encoding="utf-8")
        # -P: what lies in the working directory is not imported
        command = [sys.executable, "-P", "-m", "peerllm", "up"]
        line = text.replace(COMMAND, " ".join(map(quoted, command)), 1)
        if options:
            first = next(one for one in line.splitlines() if one.startswith("ExecStart="))
            line = line.replace(first, f"{first} {' '.join(map(quoted, options))}", 1)
        files = {self.unit: MARK + line}
        for name in drop_ins:
            text = (TEMPLATES / "drop-ins" / f"{name}.conf").read_text(encoding="utf-8")
            files[self.drop_ins / f"{name}.conf"] = MARK + text
        return files

    def write(self, files: dict[Path, str]) -> list[str]:
        """Bring the directory in line with `files`; what was done, for people. RefusedError where another's file is."""
        for path in files:
            if path.exists() and not _marked(path):
                raise RefusedError(
                    f"{path} is there and `peerllm service install` did not write it; move it away first"
                )
        done = []
        for path, text in files.items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                done.append(f"wrote {path}")
        return done + self.remove([path for path in self.written() if path not in files])

    def remove(self, paths: Sequence[Path]) -> list[str]:
        """Take these files away, and the drop-ins' directory if nothing else is in it."""
        for path in paths:
            path.unlink()
        if self.drop_ins.is_dir() and not any(self.drop_ins.iterdir()):
            self.drop_ins.rmdir()
        return [f"removed {path}" for path in paths]


def check_readable() -> None:
    """BadInputError unless a system service, which runs as a user of its own, can read this installation."""
    for found in {Path(sys.executable), Path(sys.base_prefix), Path(peerllm.__file__)}:
        path = found.resolve()
        for one in (path, *path.parents):
            if one in HIDDEN or not one.stat().st_mode & (0o1 if one.is_dir() else 0o4):
                raise BadInputError(
                    f"a system service cannot read {found}, where this peerllm runs from ({one} is closed); "
                    "install it for all: sudo python3 -m venv /opt/peerllm && "
                    "sudo /opt/peerllm/bin/pip install peerllm && "
                    "sudo /opt/peerllm/bin/peerllm service install --system"
                )


def quoted(argument: str) -> str:
    """One argument as ExecStart= takes it, with nothing in it expanded."""
    text = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if text != argument or any(char in " \t;'" for char in text) or not text else text


def _marked(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    except OSError:
        return False
