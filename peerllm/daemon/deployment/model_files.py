"""From what a person calls a model to a directory of its files: built in, on disk, or from the Hugging Face hub."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peerllm.builtin import MODEL_DIR
from peerllm.errors import ModelError, NotFoundError, UnavailableError

BUILTIN = "builtin"
BUILTIN_DTYPE = "float32"  # exact whatever its file holds
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]  # never code, never pickles
HUB_NOT = ["*/*"]  # other formats of the same weights lie in folders
HUB_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})  # modules whose errors mean: no connection
HUB_WORKERS = 4  # files downloaded at once

Progress = Callable[[float], None]  # 0 to 1


def dtype_of(model: str, dtype: str) -> str:
    """The compute dtype to ask the engine for."""
    return BUILTIN_DTYPE if model == BUILTIN else dtype


async def resolve(model: str, progress: Progress) -> Path:
    """The directory that holds `model`, downloaded first if it is a hub id; one clear line when it cannot be had."""
    if model == BUILTIN:
        return Path(MODEL_DIR)
    directory = await asyncio.to_thread(_directory, model)
    if directory is not None:
        return directory
    if not HUB_ID.fullmatch(model) or ".." in model:
        raise NotFoundError(f"{model}: no such directory, and no Hugging Face id (owner/name)")
    return await _download(model, progress)


def _directory(model: str) -> Path | None:
    path = Path(model).expanduser()
    # A relative name is an id: where the daemon happens to run must not decide what it means.
    if not path.is_absolute() or not path.is_dir():
        return None
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json: give a model directory in Hugging Face layout")
    return path.resolve()


async def _download(model: str, progress: Progress) -> Path:
    loop, halt = asyncio.get_running_loop(), threading.Event()

    def told(share: float) -> None:
        loop.call_soon_threadsafe(progress, share)

    try:
        return await asyncio.to_thread(_snapshot, model, told, halt)
    finally:
        halt.set()


class _Halted(Exception):
    """Nobody waits for this download any more."""


def _snapshot(model: str, progress: Progress, halt: threading.Event) -> Path:
    from huggingface_hub import errors, snapshot_download

    class Bar(tqdm):  # type: ignore[type-arg]
        """The hub's progress bar, drawn nowhere."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            if halt.is_set():
                raise _Halted
            result = super().update(n)
            if self.total:
                progress(min(1.0, self.n / self.total))
            return result

    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=HUB_FILES,
                ignore_patterns=HUB_NOT,
                max_workers=HUB_WORKERS,
                token=os.environ.get("HF_TOKEN") or None,
                tqdm_class=Bar,  # type: ignore[arg-type]
            )
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{model} is gated: accept its terms at https://huggingface.co/{model}, then set HF_TOKEN and start again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{model}: no such directory, and no such model on the Hugging Face hub (a private one needs HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UnavailableError(
            f"{model} is not on this disk and the Hugging Face hub cannot be reached; connect, or give a directory"
        ) from error
    except errors.HfHubHTTPError as error:
        raise UnavailableError(f"the Hugging Face hub refuses {model}: {_line(error)}") from error
    except errors.HFValidationError as error:
        raise NotFoundError(f"{model}: no such directory, and no Hugging Face id (owner/name)") from error
    except OSError as error:  # no disk space; connection errors of the hub's client are OSErrors too
        raise UnavailableError(f"{model} could not be downloaded: {_line(error)}") from error
    except _Halted:
        raise UnavailableError(f"the download of {model} was stopped") from None
    except Exception as error:  # the hub's HTTP client has a family of its own that is no part of its interface
        if type(error).__module__.split(".")[0] not in HUB_CLIENTS:
            raise
        raise UnavailableError(f"the Hugging Face hub cannot be reached for {model}: {_line(error)}") from error


class _Nowhere:
    def write(self, _: str) -> None: ...

    def flush(self) -> None: ...


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
