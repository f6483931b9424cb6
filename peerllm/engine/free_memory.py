"""Returning freed memory to the system, which glibc's allocator does not do by itself."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable

_caches: list[Callable[[], None]] = []


def empty_too(cache: Callable[[], None]) -> None:
    """Let `return_memory` call `cache` as well, which empties a library's own cache. Idempotent."""
    if cache not in _caches:
        _caches.append(cache)


def return_memory() -> None:
    """Collect garbage, empty caches and return free memory; to be called after something large was freed."""
    gc.collect()
    trim()
    for cache in _caches:
        cache()


def trim() -> None:
    """Return memory that is free now, without collecting garbage."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
