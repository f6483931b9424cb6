"""The texts of models in use: how many are kept, and how many prompts may be prepared at once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from peerllm.api.text import text_store
from peerllm.api.text.text_store import AnswerText, TextStore
from peerllm.api.text.tokens import decoding_table
from peerllm.api.text.tokens.decoding_table import SLICE, facts_of, tokens_from
from peerllm.errors import OverloadedError
from tests.api.fake import BOUND_S, byte_tokenizer, make_model_dir

TOLD = {"table": facts_of(byte_tokenizer(), byte_tokenizer().to_str()), "defaults": {}}


class Work:
    """In the place of TextWork: notes what it is asked and answers when it may."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.gate.wait(BOUND_S)
        if "prompt" in question:
            return {"ids": [1]}
        if "tokens" in question:
            return {"tokens": tokens_from(byte_tokenizer(), question["tokens"])}
        self.read.append(question["model_dir"])
        return TOLD


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
async def store(work: Work, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TextStore]:
    monkeypatch.setattr(text_store, "TextWork", lambda: work)
    one = TextStore(in_process=True)
    yield one
    await one.close()


async def test_the_models_asked_for_last_are_kept(
    store: TextStore, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_store, "MAX_MODELS", 2)
    for name in ("a", "b", "a", "c", "a", "b"):
        await store.model(name, Path(name))
    assert work.read == ["a", "b", "c", "b"], "a was asked for between b and c, so b made way"


async def test_a_model_is_read_once_however_many_ask(store: TextStore, work: Work) -> None:
    await asyncio.gather(*(store.model("a", Path("a")) for _ in range(8)))
    assert len(work.read) == 1


async def test_prompts_prepared_at_once_are_bounded_and_make_room(
    store: TextStore, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_store, "MAX_WAITING", 3)
    text: AnswerText = await store.model("a", Path("a"))
    work.gate.clear()
    waiting = [asyncio.ensure_future(store.prompt(text, [], 8)) for _ in range(3)]
    await asyncio.sleep(0)  # each has begun
    with pytest.raises(OverloadedError, match="3 prompts are being prepared"):
        await store.prompt(text, [], 8)
    work.gate.set()
    assert await asyncio.wait_for(asyncio.gather(*waiting), BOUND_S) == [[1]] * 3
    assert await store.prompt(text, [], 8) == [1]


async def test_a_large_vocabulary_is_read_elsewhere_and_comes_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it all at once would keep everything in this process standing for tenths of a second."""
    made = make_model_dir(tmp_path / "large")
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    alphabet = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] |= {f"token {n}": alphabet + 1 + n for n in range(3 * SLICE)}
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    read, told = [], []

    class Seen:
        @staticmethod
        def from_str(text: str) -> Tokenizer:
            read.append(len(text))
            return Tokenizer.from_str(text)

    monkeypatch.setattr(decoding_table, "Tokenizer", Seen)
    store = TextStore()
    asked = store._small.ask

    async def noted(question: dict[str, Any]) -> dict[str, Any]:
        answer = await asked(question)
        told.append(len(json.dumps(answer)))
        return answer

    monkeypatch.setattr(store._small, "ask", noted)
    try:
        text = await store.model("large", made)
    finally:
        await store.close()
    assert text.decoder.id_to_token(alphabet + 1 + 2 * SLICE) == f"token {2 * SLICE}"
    assert len(read) == 1 and read[0] < 4096
    assert len(told) == 5 and max(told) < 64 * SLICE
