"""All errors of peerllm. A message says in one line what is wrong and what to do."""

from __future__ import annotations

import os


class PeerLLMError(Exception):
    """Base of all errors that peerllm raises on purpose; `http_status` is the API's status for it."""

    http_status = 500


class BadInputError(PeerLLMError, ValueError):
    """A person or client gave something that cannot be used."""

    http_status = 400


class NotFoundError(PeerLLMError, LookupError):
    """No such model, deployment or device."""

    http_status = 404


class ModelError(BadInputError):
    """The model's files are missing, damaged, or of a kind that cannot be divided."""


class InfeasibleError(PeerLLMError):
    """No plan fits; `missing_bytes` is the memory that the household lacks (0: enough, but no cut fits)."""

    http_status = 409

    def __init__(self, message: str, missing_bytes: int = 0) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class RefusedError(PeerLLMError):
    """A device declined a reservation: its memory is promised elsewhere, or it cannot compute this."""

    http_status = 409


class PastEpochError(RefusedError):
    """A device has a later epoch of the deployment than the one that it is asked for."""


class DiskFullError(RefusedError):
    """There is no room on a device's disk, or in its owner's bound on cached weights; it goes on when there is."""

    http_status = 507


class OverloadedError(PeerLLMError):
    """A bounded queue is full; ask again after `retry_after_s`."""

    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(PeerLLMError):
    """The deployment cannot answer now (loading, waiting for a device, stopped)."""

    http_status = 503


class EngineError(PeerLLMError):
    """The engine failed or died; the daemon goes on."""

    http_status = 503


class EngineDownError(EngineError):
    """The engine is not running at this moment; it is started again by itself."""


class AuthenticationError(PeerLLMError, PermissionError):
    """The other side did not prove its identity, or does not belong to the household."""

    http_status = 401


class PairingError(AuthenticationError):
    """Wrong code, closed door, too many tries."""


class LinkError(PeerLLMError, ConnectionError):
    """A link to another device broke or never came up; it may be back in a moment."""

    http_status = 503


class FrameError(LinkError):
    """The format or the plan does not allow a frame; its link is closed."""


def in_words(error: BaseException) -> str:
    """What the system calls its error ("connection refused"), without number and address; any other error's text."""
    plain = type(error).__module__ == OSError.__module__  # those of name resolution and TLS have numbers of their own
    if plain and isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return str(error)


def one_line(error: BaseException, most: int = 300) -> str:
    """The text of any error in one line of at most `most` characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def error_class(name: str, default: type[PeerLLMError] = PeerLLMError) -> type[PeerLLMError]:
    """The class that another process names in a message; `default` if this one does not know it."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, PeerLLMError) else default
