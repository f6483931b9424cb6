"""Sizes in bytes as a person reads them."""

from __future__ import annotations

UNITS = ("bytes", "kB", "MB", "GB", "TB")


def human_bytes(nbytes: float) -> str:
    """The size with three significant digits and a decimal unit."""
    size, unit = abs(float(nbytes)), 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    digits = 0 if unit == 0 or size >= 100 else 1 if size >= 10 else 2
    return f"{'-' if nbytes < 0 else ''}{size:.{digits}f} {UNITS[unit]}"
