"""What the Hugging Face hub refuses, as one clear line each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peerllm.daemon.weights.known_models import suggestion
from peerllm.errors import ModelError, NotFoundError, PeerLLMError, UnavailableError

CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})  # modules whose errors mean: no connection


class HaltedError(Exception):
    """Nobody waits for this download any more."""


@contextlib.contextmanager
def errors_of(model: str) -> Iterator[None]:
    """The hub's refusals as one clear line each."""
    from huggingface_hub import errors

    try:
        yield
    except PeerLLMError:
        raise
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model} is gated: accept its terms at https://huggingface.co/{model}, then set HF_TOKEN and start again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{model}: no such directory, and no such model on the Hugging Face hub (a private one needs HF_TOKEN)"
            f"{suggestion(model)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UnavailableError(
            f"{model} is not on this disk and the Hugging Face hub cannot be reached; connect, or give a directory"
            f"{suggestion(model) if '/' not in model else ''}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise UnavailableError(f"the Hugging Face hub refuses {model}: {_line(error)}") from error
    except errors.SafetensorsParsingError as error:
        raise ModelError(f"{model} is no safetensors file: {_line(error)}") from error
    except errors.HFValidationError as error:
        raise NotFoundError(f"{model}: no such directory, and no Hugging Face id (owner/name)") from error
    except OSError as error:  # no disk space; connection errors of the hub's client are OSErrors too
        raise UnavailableError(f"{model} could not be downloaded: {_line(error)}") from error
    except HaltedError:
        raise UnavailableError(f"the download of {model} was stopped") from None
    except Exception as error:  # the hub's HTTP client has a family of its own that is no part of its interface
        if type(error).__module__.split(".")[0] not in CLIENTS:
            raise
        raise UnavailableError(f"the Hugging Face hub cannot be reached for {model}: {_line(error)}") from error


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
