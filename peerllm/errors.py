"""The one family of errors. A message says what is wrong and what to do, in one line."""

from __future__ import annotations


class PeerLLMError(Exception):
    """Root of everything peerllm raises on purpose; `http_status` is what the API answers with."""

    http_status = 500


class BadInputError(PeerLLMError, ValueError):
    """What the person or the client gave cannot be used."""

    http_status = 400


class NotFoundError(PeerLLMError, LookupError):
    """No such model, deployment or device."""

    http_status = 404


class ModelError(BadInputError):
    """The model's files are missing, damaged, or of a kind that cannot be divided."""


class InfeasibleError(PeerLLMError):
    """No plan fits; `missing_bytes` is what the household lacks (0 if only the cut does not fit)."""

    http_status = 409

    def __init__(self, message: str, missing_bytes: int = 0) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class RefusedError(PeerLLMError):
    """A device declined a reservation: its memory is promised elsewhere, or it cannot compute this."""

    http_status = 409


class OverloadedError(PeerLLMError):
    """The bounded queue is full; ask again after `retry_after_s`."""

    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(PeerLLMError):
    """The deployment cannot answer now (loading, waiting for a device, stopped)."""

    http_status = 503


class EngineError(PeerLLMError):
    """The engine failed or died; the daemon lives on."""

    http_status = 503


class AuthenticationError(PeerLLMError, PermissionError):
    """The other side did not prove who it is, or is not of the household."""

    http_status = 401


class PairingError(AuthenticationError):
    """Wrong code, closed door, too many tries."""


class LinkError(PeerLLMError, ConnectionError):
    """A link to another device broke or never came up."""

    http_status = 503


class FrameError(LinkError):
    """A frame that the format or the plan does not allow; the link it came on is closed."""


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of any kind says, of so many characters at most."""
    return " ".join(str(error).split())[:most] or type(error).__name__
