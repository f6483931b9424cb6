"""Freed memory back to the system, which glibc's allocator does not do by itself."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable

_caches: list[Callable[[], None]] = []


def empty_too(cache: Callable[[], None]) -> None:
    """From now on `return_memory` calls `cache` as well: what a library keeps for itself."""
    if cache not in _caches:
        _caches.append(cache)


def return_memory() -> None:
    """After something large was let go."""
    gc.collect()
    trim()
    for cache in _caches:
        cache()


def trim() -> None:
    """What is free already, at once."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
