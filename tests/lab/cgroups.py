"""Limits for real processes: control groups of the kernel's controllers (version 1), gone with their block.

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
from collections.abc import Iterable
from pathlib import Path

ROOT = Path("/sys/fs/cgroup/memory")
CPU_ROOT = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 20_000  # of a processor group: it may have its share of each
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
        _remove(self.path)

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProcessorGroup:
    """Slows processes down: all that are in it may have so much of one processor together."""

    def __init__(self) -> None:
        self.path = CPU_ROOT / f"peerlab-{os.getpid()}-{next(_numbers)}"
        self.path.mkdir()
        (self.path / "cpu.cfs_period_us").write_text(str(PERIOD_US))

    def add(self, pids: Iterable[int]) -> None:
        """Their later children come along."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self.path / "cgroup.procs").write_text(str(pid))

    def limit(self, processors: float | None) -> None:
        """None: no limit."""
        quota = -1 if processors is None else max(1000, int(processors * PERIOD_US))
        (self.path / "cpu.cfs_quota_us").write_text(str(quota))

    def close(self) -> None:
        """What is in it goes on without a limit."""
        for pid in (self.path / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (CPU_ROOT / "cgroup.procs").write_text(pid)
        _remove(self.path)

    def __enter__(self) -> ProcessorGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def why_no_processor_groups() -> str:
    """Why processors cannot be limited here, or "" when they can."""
    if sys.platform != "linux" or not CPU_ROOT.exists():
        return "limits of processors need Linux with version 1 of the processor controller"
    try:
        with ProcessorGroup() as group:
            group.limit(0.5)
    except OSError as error:
        return f"no control group can be made here: {error}"
    return ""


def _remove(path: Path) -> None:
    deadline = time.monotonic() + LEAVE_TIMEOUT_S
    while path.exists():
        with contextlib.suppress(OSError):
            path.rmdir()
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not empty")
        time.sleep(0.02)
