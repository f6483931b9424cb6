"""Freed memory back to the system, which glibc's allocator does not do by itself."""

from __future__ import annotations

import ctypes
import gc


def return_memory() -> None:
    """After something large was let go."""
    gc.collect()
    trim()


def trim() -> None:
    """What is free already, at once."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return
