"""Dry passes: a model's walk without its products, so that its code is in the processor's caches when a step comes.

What a dry pass computes is nonsense; where it is kept, the next pass of the same tokens writes over it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PRODUCTS = 4  # that a fused block counts for
MOST_NUMBERS = 1 << 18  # whose place is still worth making: the logits of one or two sequences
ENOUGH = 3 * PRODUCTS  # three blocks: the others run the same code

_thread = threading.local()


class Ended(BaseException):
    """There is something to do, or it was enough. No model is to take it for an error."""


@contextmanager
def passing(stop: Callable[[], bool]) -> Iterator[None]:
    """This thread's passes are dry, and end early: when `stop` says so, or when enough was gone through."""
    _thread.stop, _thread.left = stop, ENOUGH
    try:
        yield
    except Ended:
        pass
    finally:
        del _thread.stop


def dry(products: int = 1, numbers: int = 0) -> bool:
    """Asked by what is about to make so many `numbers` by multiplying: whether to leave it."""
    stop = getattr(_thread, "stop", None)
    if stop is None:
        return False
    _thread.left -= products
    if _thread.left < 0 or numbers > MOST_NUMBERS or stop():
        raise Ended
    return True
