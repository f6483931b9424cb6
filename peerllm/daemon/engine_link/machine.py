"""What this machine is: memory, processors, and the lock that keeps a second daemon off the same data."""

from __future__ import annotations

import contextlib
import hmac
import os
import platform
from pathlib import Path
from typing import IO

import psutil

from peerllm.errors import BadInputError

RESERVE_SHARE = 0.1  # of the machine's memory, kept for others where the owner said nothing ...
RESERVE_BYTES = 512 << 20  # ... and at least this
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOCK_FILE = "daemon.lock"


def memory_bytes() -> int:
    """The machine's memory, or its cgroup's limit if that is less."""
    total = int(psutil.virtual_memory().total)
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(file.read_text(encoding="ascii")))
    return total


def lent_of(wish: int | None, memory_bytes: int, free_bytes: int) -> int:
    """What is offered of an accelerator's own memory: a reserve stays free, also where the owner wishes for all."""
    if wish is not None:
        return min(wish, max(0, free_bytes - RESERVE_BYTES))
    return max(0, free_bytes - max(RESERVE_BYTES, int(memory_bytes * RESERVE_SHARE)))


def lent_bytes(wish: int | None, runtime_bytes: int, running: bool = True) -> int:
    """What is offered: the owner's wish, or what is free now beside the engine's own `runtime_bytes` and a reserve.

    `running`: whether the engine runs, so that what is available leaves it out already.
    """
    total = memory_bytes()
    if wish is not None:
        return min(wish, total)
    own = psutil.Process().memory_info().rss + runtime_bytes
    available = int(psutil.virtual_memory().available) - (0 if running else runtime_bytes)
    free = min(available, total - own)  # what a cgroup allows counts the engine, running or not
    return max(0, free - max(RESERVE_BYTES, int(total * RESERVE_SHARE)))


def processors() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def hardware() -> str:
    """Names system, processor and memory: measurements hold as long as this line stays the same."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model", "Hardware")):
                model = line.partition(":")[2].strip()
                break
    return f"{platform.system()} {platform.machine()} {model} {memory_bytes() >> 20} MiB"


def fingerprint() -> str:
    """The same for all that runs on one machine, containers included, until it starts anew; "" where it is unknown.

    The system's own number for this start is random; what is told of it says nothing to anybody else.
    """
    try:
        boot = BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    return hmac.new(b"peerllm machine 1", boot.encode(), "sha256").hexdigest()[:32] if boot else ""


def lock(data_dir: Path) -> IO[str]:
    """Hold the data directory until the returned file is closed; BadInputError if that cannot be."""
    try:
        file = (data_dir / LOCK_FILE).open("w", encoding="ascii")
    except OSError as error:
        raise BadInputError(f"cannot write to {data_dir} ({error.strerror}); choose another --data") from error
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise BadInputError(f"a device is running on {data_dir} already; choose another --data") from error
    return file
