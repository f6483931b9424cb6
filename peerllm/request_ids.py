"""The id of the request that caused what is being done: in every log line, in answers, and in what devices ask others.

It goes with the work by itself: tasks and `asyncio.to_thread` take it along.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

HEADER = "X-Request-Id"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(cause)s%(message)s"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_current: ContextVar[str] = ContextVar("request id", default="")


def current() -> str:
    """ "" where no request is the cause."""
    return _current.get()


def taken_or_made(given: str | None) -> str:
    """The id that a client gave, if it is short and plain, else a new one."""
    return given if given is not None and is_plain(given) else f"req_{secrets.token_hex(6)}"


def is_plain(given: str) -> bool:
    """Whether it can stand in a log and in a header."""
    return _PLAIN.fullmatch(given) is not None


@contextmanager
def caused_by(request_id: str) -> Iterator[None]:
    """What is done inside is caused by that request; "": by none."""
    before = _current.set(request_id)
    try:
        yield
    finally:
        _current.reset(before)


class CauseInLog(logging.Filter):
    """Of a handler whose format is LOG_FORMAT."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.cause = f"[{current()}] " if current() else ""
        return True
