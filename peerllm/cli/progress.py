"""What the commands show of long work: how a model is named to the device, and its progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peerllm.builtin import BUILTIN
from peerllm.cli.terminal import PERCENT, printable
from peerllm.daemon.weights.gguf_choice import SUFFIX


def as_model(name: str) -> str:
    """A local directory or file as an absolute path (the device runs elsewhere), anything else as it is."""
    path = Path(name).expanduser()
    if name == BUILTIN or not (path.is_dir() or (path.is_file() and path.suffix.lower() == SUFFIX)):
        return name
    return str(path.resolve()) if path.is_dir() else str(path.absolute())  # a link's name says more than its file's


def show_progress(lines: Iterable[Mapping[str, Any]]) -> None:
    """Tell what goes on until the lines end."""
    for _ in progress(lines):
        pass


def progress(lines: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Hands the lines on; of those that report progress, tells every message that differs in more than its percentage.

    On stderr, with a bar per device on a terminal.
    """
    with contextlib.closing(ProgressBars()) as bars:
        for line in lines:
            bars.show(f"{line.get('state')}: ", str(line.get("message") or ""), line.get("devices") or {})
            yield line


class ProgressBars:
    """Lines of text, and below them, on a terminal, a bar for each thing that goes on."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}
        self._said = ""

    def show(self, state: str, message: str, shares: Mapping[str, float]) -> None:
        """`shares`: how much is done, 0 to 1, by the bar's name."""
        message = printable(message)
        kind = PERCENT.sub("", message)
        if kind and kind != self._said:
            self._said = kind
            tqdm.write(f"{state}{message}", file=sys.stderr)
        if sys.stderr.isatty():
            for name, share in shares.items():
                self._move(printable(name), share)

    def _move(self, name: str, share: float) -> None:
        if name not in self._bars:
            self._bars[name] = tqdm(total=100, desc=name[:24], unit="%", leave=False, position=len(self._bars),
                                    bar_format="{desc:<24} {bar} {percentage:3.0f} %")  # fmt: skip
        self._bars[name].n = round(100 * min(1.0, max(0.0, float(share))))
        self._bars[name].refresh()

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
