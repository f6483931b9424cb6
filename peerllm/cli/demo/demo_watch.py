"""The demo while it runs: devices that end are told of, and started again when the person wants them back."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from peerllm.cli.demo.demo_devices import DemoDevice
from peerllm.errors import UnavailableError


class DemoWatch:
    """`run` it after all devices are ready; `say` tells the person at the terminal."""

    def __init__(self, devices: Sequence[DemoDevice], say: Callable[[str], None]) -> None:
        self._devices, self._say = devices, say
        self._happened: queue.SimpleQueue[tuple[DemoDevice, str] | None] = (
            queue.SimpleQueue()
        )  # None: Enter was pressed
        self._ended: list[DemoDevice] = []
        self._reader: threading.Thread | None = None

    def run(self) -> None:
        """Until the first device ends: UnavailableError, since nobody asked it to."""
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)  # in the background the terminal is not read, and nothing stops
        for device in self._devices:
            self._watch(device)
        while True:
            happened = self._happened.get()
            if happened is None:
                self._start_again()
                continue
            device, how = happened
            if device is self._devices[0]:
                raise UnavailableError(f"the device {device.name} {how}")
            self._ended.append(device)
            hint = " Press Enter here to start it again." if sys.stdin.isatty() else ""
            self._say(f"{device.name} {how}. The others go on without it, if they can hold the model.{hint}")
            self._read()

    def _watch(self, device: DemoDevice) -> None:
        def wait() -> None:
            self._happened.put((device, device.wait()))

        threading.Thread(target=wait, name=f"wait for {device.name}", daemon=True).start()

    def _read(self) -> None:
        """Only from now on, so that what was typed before starts nothing."""

        def read() -> None:
            with contextlib.suppress(OSError):
                while os.read(sys.stdin.fileno(), 4096):
                    self._happened.put(None)

        if self._reader is None or not self._reader.is_alive():
            self._reader = threading.Thread(target=read, name="wait for Enter", daemon=True)
            self._reader.start()

    def _start_again(self) -> None:
        for device in self._ended:
            device.start_again()
            self._watch(device)
            self._say(f"{device.name} starts again, which takes a few seconds; then it gets layers again.")
        self._ended.clear()
