"""One device of the demo: a `peerllm up` process of its own that ends with its parent."""

from __future__ import annotations

import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

from peerllm.errors import UnavailableError

READY_S = 120.0  # seconds to be ready; loading libraries on a busy small machine is slow
END_S = 15.0  # seconds to end by itself
MAX_LOG_CHARS = 1500  # of a failed device's log in the error


class DemoDevice:
    """Started at once; its standard input is a pipe we hold, whose end tells it that we are gone."""

    def __init__(
        self, data_dir: Path, name: str, memory_bytes: int, threads: int, api: tuple[str, int], expected: str = ""
    ) -> None:
        self.data_dir, self.name = data_dir, name
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        host = f"[{api[0]}]" if ":" in api[0] else api[0]
        self._command = [
            sys.executable, "-m", "peerllm", "up", "--data", str(data_dir), "--name", name, "--port", "0",
            "--api", f"{host}:{api[1]}", "--memory", str(memory_bytes), "--threads", str(threads),
            "--no-mdns", "--loopback", "--exit-with-parent", "--expect", expected,
        ]  # fmt: skip
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as log:
            return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)  # noqa: S603

    def start_again(self) -> None:
        """It has ended; the new process has its data, so it belongs to the household."""
        self._close_pipes()
        self._process = self._started()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def _log_path(self) -> Path:
        return self.data_dir / "log.txt"

    def wait_ready(self) -> None:
        """Until it serves; UnavailableError with its last words if it ends first."""
        output = self._process.stdout
        assert output is not None
        deadline = time.monotonic() + READY_S
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline - time.monotonic())):
                line = output.readline()
                if line.startswith(b"ready "):
                    return
                if not line:
                    raise UnavailableError(f"the device {self.name} did not start: {self._last_words()}")
        raise UnavailableError(f"the device {self.name} was not ready after {READY_S:g} s: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self._log_path.read_text(errors="replace")[-MAX_LOG_CHARS:].strip().splitlines()
        return lines[-1].removeprefix("peerllm: ") if lines else "it said nothing"

    def wait(self) -> str:
        """Until it ends; how it did."""
        status = self._process.wait()
        return "was killed" if status == -signal.SIGKILL else f"ended: {self._last_words()}"

    def ask_to_end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def end(self) -> None:
        """Waits for it, and kills it if it does not heed."""
        self.ask_to_end()
        self._close_pipes()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
