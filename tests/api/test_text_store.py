"""The texts of models in use: how many are kept, and how many prompts may be prepared at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from peerllm.api.text import text_store
from peerllm.api.text.text_store import TextStore
from peerllm.errors import OverloadedError
from tests.api.fake import BOUND_S


@pytest.fixture
async def store() -> AsyncIterator[TextStore]:
    one = TextStore()
    yield one
    one.close()


async def test_the_models_asked_for_last_are_kept(store: TextStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(text_store, "MAX_MODELS", 2)
    monkeypatch.setattr(text_store, "ModelText", lambda path: read.append(path.name))
    for name in ("a", "b", "a", "c", "a", "b"):
        await store.model(name, Path(name))
    assert read == ["a", "b", "c", "b"], "a was asked for between b and c, so b made way"


async def test_a_model_is_read_once_however_many_ask(store: TextStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(text_store, "ModelText", read.append)
    await asyncio.gather(*(store.model("a", Path("a")) for _ in range(8)))
    assert len(read) == 1


async def test_prompts_prepared_at_once_are_bounded_and_make_room(
    store: TextStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_store, "MAX_WAITING", 3)
    gate = threading.Event()

    class Slow:
        def prompt(self, messages: Any) -> list[int]:
            assert gate.wait(BOUND_S)
            return [1]

    text: Any = Slow()
    waiting = [asyncio.ensure_future(store.prompt(text, [])) for _ in range(3)]
    await asyncio.sleep(0)  # each has begun
    with pytest.raises(OverloadedError, match="3 prompts are being prepared"):
        await store.prompt(text, [])
    gate.set()
    assert await asyncio.wait_for(asyncio.gather(*waiting), BOUND_S) == [[1]] * 3
    assert await store.prompt(text, []) == [1]
