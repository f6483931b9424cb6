"""What the commands show of long work: how a model is named to the device, and its progress."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peerllm.cli.terminal import printable
from peerllm.daemon.weights.gguf_choice import SUFFIX
from peerllm.daemon.weights.known_models import BUILTIN

_PERCENT = re.compile(r"\d+(\.\d+)? ?%")


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
    bars: dict[str, tqdm[Any]] = {}
    said = ""
    try:
        for line in lines:
            message = printable(str(line.get("message") or ""))
            kind = _PERCENT.sub("", message)
            if kind and kind != said:
                said = kind
                tqdm.write(f"{line.get('state')}: {message}", file=sys.stderr)
            if sys.stderr.isatty():
                _move(bars, line.get("devices") or {})
            yield line
    finally:
        for bar in bars.values():
            bar.close()


def _move(bars: dict[str, tqdm[Any]], shares: Mapping[str, float]) -> None:
    for name, share in shares.items():
        if name not in bars:
            bars[name] = tqdm(total=100, desc=printable(name)[:24], unit="%", leave=False, position=len(bars),
                              bar_format="{desc:<24} {bar} {percentage:3.0f} %")  # fmt: skip
        bars[name].n = round(100 * min(1.0, max(0.0, float(share))))
        bars[name].refresh()
