"""Text for a terminal: names and answers come from elsewhere, so control characters never reach it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Sequence

PERCENT = re.compile(r"\d+(\.\d+)? ?%")  # what differs between two words of the same progress
_KEPT = "\n\t"


def printable(text: str) -> str:
    """`text` without what could steer a terminal: control, format and surrogate characters."""
    return "".join(char for char in text if char in _KEPT or unicodedata.category(char) not in {"Cc", "Cs", "Co"})


def tell(text: str) -> None:
    """To the person at the terminal; scripts read standard output."""
    print(printable(text), file=sys.stderr, flush=True)


class PassingNote:
    """What an answer waits for, on the line below it, gone when it goes on; to stderr where that cannot be erased."""

    def __init__(self) -> None:
        self._shown = ""
        self._erasable = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")

    def show(self, text: str) -> None:
        """In place of the one before; an empty one takes that away."""
        text = printable(" ".join(text.split()))
        before, self._shown = self._shown, text
        if text == before:
            return
        if self._erasable:
            room = shutil.get_terminal_size().columns - 1
            # Make sure of a line below, remember the place, write there, come back (VT100).
            print(f"\x1bD\x1bM\x1b7\r\x1bD\x1b[K\x1b[2m{text[:room]}\x1b[0m\x1b8", end="", flush=True)
        elif PERCENT.sub("", text) not in ("", PERCENT.sub("", before)):
            tell(text)


def human_ms(value: float) -> str:
    """Milliseconds as a person says them: "0.42 ms", "58 ms", "5.1 s", "12 min"; two digits and never an exponent."""
    if value < 999.5:
        return f"{_two_digits(value)} ms"
    return f"{_two_digits(value / 1000)} s" if value < 600_000 else f"{value / 60_000:,.0f} min"


def _two_digits(value: float) -> str:
    """Two digits that count where they stand behind the point; whole numbers are whole."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}".rstrip("0.") or "0"


def human_rate(value: float) -> str:
    """Tokens a second, or megabits: three digits, thousands set apart, never an exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for their longest cell; the first row is the heading."""
    clean = [[printable(cell).replace("\n", " ").replace("\t", " ") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in clean) for column in range(len(clean[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in clean)
    return "\n".join(lines)


def layer_bar(first: int, last: int, layers: int, width: int = 32) -> str:
    """Where layers first..last lie among `layers`, drawn in `width` characters; every range shows at least one."""
    start = first * width // layers
    end = max(start + 1, (last + 1) * width // layers)
    return "·" * start + "█" * (end - start) + "·" * (width - end)
