"""Memory limits for real processes: a control group of the kernel's memory controller (version 1), gone with its block.

with MemoryGroup() as group:
    python = group.launcher(directory)  # in place of sys.executable: the process is inside from its first page on
    group.limit(400 << 20)
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup/memory")
LEAVE_TIMEOUT_S = 10.0  # killed processes leave a group a moment after their end
_numbers = itertools.count()


def why_no_memory_groups() -> str:
    """Why memory cannot be limited here, or "" when it can."""
    if sys.platform != "linux" or not (ROOT / "memory.limit_in_bytes").exists():
        return "limits of memory need Linux with version 1 of the memory controller"
    try:
        MemoryGroup().close()
    except OSError as error:
        return f"no control group can be made here: {error}"
    return ""


class MemoryGroup:
    """No limit until one is set. What is mapped from files counts for whoever touched it first, in whatever group."""

    def __init__(self) -> None:
        self.path = ROOT / f"peerlab-{os.getpid()}-{next(_numbers)}"
        self.path.mkdir()

    def launcher(self, directory: Path) -> Path:
        """An executable that enters the group, then becomes this interpreter."""
        script = directory / f"python-{self.path.name}"
        script.write_text(f'#!/bin/sh\necho $$ > {self.path}/cgroup.procs && exec {sys.executable} "$@"\n')
        script.chmod(0o755)
        return script

    def limit(self, nbytes: int) -> None:
        """From now on, and what was the most so far is forgotten."""
        (self.path / "memory.limit_in_bytes").write_text(str(nbytes))
        (self.path / "memory.max_usage_in_bytes").write_text("0")

    def value(self, name: str) -> int:
        return int((self.path / f"memory.{name}").read_text())

    def stat(self, name: str) -> int:
        """A line of memory.stat: `rss` is what belongs to no file, `cache` what does."""
        return self._line("memory.stat", name)

    @property
    def kills(self) -> int:
        """How often the kernel killed here for want of memory."""
        return self._line("memory.oom_control", "oom_kill")

    def _line(self, file: str, name: str) -> int:
        lines = dict(line.split() for line in (self.path / file).read_text().splitlines())
        return int(lines[name])

    def close(self) -> None:
        """The processes in it must have ended."""
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        while self.path.exists():
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.path} does not empty")
            time.sleep(0.02)

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
