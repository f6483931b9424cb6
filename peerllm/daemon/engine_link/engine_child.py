"""The engine's process as the daemon sees it: started, watched, and diagnosed when it dies. No torch, no messages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
from collections import deque
from pathlib import Path

import peerllm
from peerllm.types import TORCH_KERNELS

log = logging.getLogger("peerllm.engine")

TAIL_LINES = 40  # of the engine's stderr that are kept
MAX_LINE_BYTES = 2000
CLOSE_TIMEOUT_S = 3.0  # from the closed line to SIGKILL
DRAIN_TIMEOUT_S = 1.0  # for what the dead process left in its stderr
OUT_OF_MEMORY = re.compile(r"MemoryError|bad_alloc|can't allocate memory|Cannot allocate memory|out of memory", re.I)
# Of the engine's libraries; the second keeps transformers from fetching compiled code where `kernels` is installed. The
# last two bound what torch and oneDNN keep of compiled matrix products, which plans have room for
# (engine/model/torch_inspect.py).
FIXED = {
    "TOKENIZERS_PARALLELISM": "false",
    "USE_HUB_KERNELS": "NO",
    "LRU_CACHE_CAPACITY": str(TORCH_KERNELS),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(TORCH_KERNELS),
}
CGROUP_FILES = (Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))


class EngineChild:
    """One engine process; `socket` is the daemon's end of the line to it."""

    def __init__(self, process: asyncio.subprocess.Process, line: socket.socket) -> None:
        self.process, self.socket = process, line
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._kills = oom_kills()
        self._watching = asyncio.create_task(self._watch(), name=f"engine {process.pid} stderr")

    @classmethod
    async def start(cls, threads: int) -> EngineChild:
        """A new process of this interpreter, which loads its libraries and then waits for its first message."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "peerllm.engine", "--fd", str(theirs.fileno()), "--parent", str(os.getpid())),
                pass_fds=(theirs.fileno(),),
                env=environment(threads),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            undo.pop_all()
        return cls(process, ours)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ended(self) -> str:
        """After the line was closed: wait for the process to end, and return why it did."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            return "the engine closed its line without ending"
        await asyncio.wait({self._watching}, timeout=DRAIN_TIMEOUT_S)
        self._watching.cancel()
        return diagnose(self.process.returncode or 0, list(self._tail), oom_kills() > self._kills)

    async def close(self) -> None:
        """After the line was closed: wait for the process to end, and kill it if it does not."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.process.wait()
        except TimeoutError:
            log.warning("the engine (process %d) does not end; killing it", self.pid)
        finally:
            self.kill()
        await self.process.wait()
        await asyncio.wait({self._watching}, timeout=DRAIN_TIMEOUT_S)
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    def kill(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def _watch(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        rest = b""
        while data := await stream.read(1 << 14):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._note(line)
            rest = rest[:MAX_LINE_BYTES]
        if rest:
            self._note(rest)

    def _note(self, line: bytes) -> None:
        text = line[:MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if text:
            self._tail.append(text)
            log.info("engine: %s", text)


def environment(threads: int) -> dict[str, str]:
    """The engine's environment: this process's, with the bound on threads and with modules found on our path alone."""
    root = str(Path(peerllm.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    bounds = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **bounds, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **FIXED}


def diagnose(code: int, tail: list[str], oom_killed: bool) -> str:
    """One line: why a process with this exit status (negative: a signal) and last stderr lines ended."""
    last = tail[-1] if tail else ""
    if oom_killed or any(OUT_OF_MEMORY.search(line) for line in tail[-5:]):
        return "the engine ran out of memory; lend less with --memory, or run a smaller model"
    if code == -signal.SIGKILL:
        return "the engine was killed (SIGKILL), by hand or by the system for want of memory"
    if code == -getattr(signal, "SIGBUS", 0):
        return "a model's file became shorter while it was used, or its disk failed (SIGBUS); put the whole file back"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"the engine crashed ({name})" + (f": {last}" if last else "")
    if last.startswith("engine: "):
        return last.removeprefix("engine: ")
    return f"the engine ended with status {code}" + (f": {last}" if last else "")


def oom_kills() -> int:
    """How often the kernel killed for memory in this process's cgroup; 0 where that cannot be known."""
    listing, root = CGROUP_FILES
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for line in listing.read_text(encoding="ascii", errors="replace").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                total += _counter(root / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                total += _counter(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return total


def _counter(file: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0
