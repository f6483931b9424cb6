"""Downloading a model from the Hugging Face hub into its cache, with progress, and to be ended at any moment."""

from __future__ import annotations

import glob
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peerllm.daemon.threads import Progress
from peerllm.daemon.weights.hub import WORKERS, Repository, token
from peerllm.daemon.weights.hub_errors import HaltedError, errors_of


def download(found: Repository, told: Progress, total_bytes: int, halt: threading.Event) -> tuple[Path, ...]:
    """The model directory or GGUF files in the hub's cache, once all is there.

    `total_bytes`: what is missing of it, 0: unknown. Set `halt` to end it; what came so far is kept for later.
    """
    from huggingface_hub import snapshot_download

    names = [glob.escape(name) for name in found.sizes]
    with errors_of(found.model):
        directory = snapshot_download(
            found.model,
            allow_patterns=names,
            max_workers=WORKERS,
            token=token(),
            tqdm_class=hub_bar(told, total_bytes, halt),  # type: ignore[arg-type]
        )
    place = Path(directory)
    return (place,) if found.gguf is None else tuple(place / name for name in found.gguf.files)


def hub_bar(told: Progress, total_bytes: int, halt: threading.Event) -> type[tqdm[Any]]:
    """The hub's progress bars, drawn nowhere: those that count bytes tell every further percent."""

    class Bar(tqdm):  # type: ignore[type-arg]
        percent = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Nowhere()})

        def update(self, n: float | None = 1) -> bool | None:
            if halt.is_set():
                raise HaltedError
            result = super().update(n)
            total = total_bytes or self.total or 0
            if self.unit == "B" and total and int(100 * self.n / total) > Bar.percent:
                Bar.percent = int(100 * self.n / total)
                told(min(1.0, self.n / total))
            return result

    return Bar


class _Nowhere:
    def write(self, _: str) -> None: ...

    def flush(self) -> None: ...
