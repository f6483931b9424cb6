"""Ollama's /api/generate: an answer that goes on from an earlier one, and a gap that is filled in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from tokenizers import AddedToken, Tokenizer, processors

from peerllm.api.server import ApiServer
from peerllm.api.text.fill_in import fill_in_form
from peerllm.api.text.model_text import ModelText, PromptLengthError
from tests.api.fake import CONTEXT, END, FakeHousehold, byte_tokenizer, make_model_dir
from tests.api.relay_pair import Pair
from tests.api.templates import HERMES

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture
async def lama(server: ApiServer) -> ollama.AsyncClient:
    return ollama.AsyncClient(server.url, headers={"Authorization": "Bearer none"})


def prompts(household: FakeHousehold) -> list[str]:
    return [household.tokenizer.decode(list(one.prompt), skip_special_tokens=False) for one in household.requests]


async def test_the_next_answer_goes_on_with_exactly_the_same_ids(
    lama: ollama.AsyncClient, household: FakeHousehold
) -> None:
    household.reply = "Good day."
    first = await lama.generate("builtin", "Hello", system="Be kind.")
    assert first.context == [*household.requests[0].prompt, *household.ids("Good day.")], "without the end's token"
    parts = [one async for one in await lama.generate("builtin", "And?", context=first.context, stream=True)]
    second = household.requests[1].prompt
    assert list(second[: len(first.context)]) == first.context
    assert parts[-1].context == [*second, *household.ids("Good day.")] and not any(one.context for one in parts[:-1])
    third = await lama.generate("builtin", "So?", system="Be kind.", context=parts[-1].context)
    assert third.context is not None
    whole = [
        {"role": "system", "content": "Be kind."},
        *({"role": role, "content": text} for one in ("Hello", "And?", "So?") for role, text in
          (("user", one), ("assistant", "Good day.")))
    ]  # fmt: skip
    assert household.model.model_dir is not None
    assert list(household.requests[2].prompt) == ModelText(household.model.model_dir).prompt(whole[:-1], CONTEXT)
    raw = await lama.generate("builtin", "x", raw=True)
    assert raw.context is None
    chat = await lama.chat("builtin", [{"role": "user", "content": "x"}])
    assert "context" not in chat.model_dump(exclude_none=True)


async def test_another_device_tells_the_same_context(pair: Pair) -> None:
    async with pair.session.post(
        "/api/generate", json={"model": "builtin", "prompt": "a", "stream": False}
    ) as response:
        told = (await response.json())["context"]
    assert told == [*pair.laptop.requests[0].prompt, *pair.laptop.ids(pair.laptop.reply)]
    body = {"model": "builtin", "prompt": "b", "context": told, "stream": False}
    async with pair.session.post("/api/generate", json=body) as response:
        assert response.status == 200
    assert list(pair.laptop.requests[1].prompt[: len(told)]) == told and not pair.mini.requests


async def test_an_answer_that_was_cut_is_whole_in_the_context(
    lama: ollama.AsyncClient, household: FakeHousehold
) -> None:
    made = await lama.generate("builtin", "Hello", options={"num_predict": 3})
    assert made.done_reason == "length" and made.context == [*household.requests[0].prompt, *household.ids("Hel")]
    with pytest.raises(ollama.ResponseError, match="context") as caught:
        await lama.generate("builtin", "x" * 20, context=[1] * (CONTEXT - 10))
    assert caught.value.status_code == 400


def filling(path: Path, tokens: tuple[str, ...] = FIM) -> Path:
    make_model_dir(path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in tokens])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
async def filler(tmp_path: Path) -> AsyncIterator[tuple[ollama.AsyncClient, FakeHousehold, Any]]:
    """A household whose model was trained to fill in."""
    made = FakeHousehold(filling(tmp_path / "filler"))
    made.tokenizer = Tokenizer.from_file(str(tmp_path / "filler" / "tokenizer.json"))
    server = ApiServer(made, "127.0.0.1", 0, tmp_path / "data2", in_process=True)
    await server.start()
    yield ollama.AsyncClient(server.url, headers={"Authorization": "Bearer none"}), made, server
    await server.close()


async def test_a_gap_is_filled_in(filler: tuple[ollama.AsyncClient, FakeHousehold, Any]) -> None:
    lama, household, _ = filler
    shown = await lama.show("builtin")
    assert "insert" in (shown.capabilities or ()) and ".Suffix" in (shown.template or "")
    made = await lama.generate("builtin", "def f(", suffix="return {x}", system="ignored")
    assert made.response == household.reply and made.context
    await lama.generate("builtin", "", suffix="end")
    assert prompts(household) == [
        "<|fim_prefix|>def f(<|fim_suffix|>return {x}<|fim_middle|>", "<|fim_prefix|><|fim_suffix|>end<|fim_middle|>",
    ]  # fmt: skip


async def test_openais_completions_fill_in_too(filler: tuple[ollama.AsyncClient, FakeHousehold, ApiServer]) -> None:
    import openai

    _, household, server = filler
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    await client.completions.create(model="builtin", prompt=["a", "b"], suffix="z", max_tokens=40)
    assert sorted(prompts(household)) == [f"<|fim_prefix|>{one}<|fim_suffix|>z<|fim_middle|>" for one in "ab"]
    with pytest.raises(openai.BadRequestError, match="token ids"):
        await client.completions.create(model="builtin", prompt=[1, 2], suffix="z")


@pytest.mark.parametrize(
    ("tokens", "form"),
    [
        (FIM, "<|fim_prefix|>{before}<|fim_suffix|>{after}<|fim_middle|>"),
        (FIM[:2], ""),
        (("[SUFFIX]", "[PREFIX]"), "[SUFFIX]{after}[PREFIX]{before}"),
        (
            ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
            "<｜fim▁begin｜>{before}<｜fim▁hole｜>{after}<｜fim▁end｜>",
        ),
        ((), ""),
    ],
)  # fmt: skip
def test_which_models_fill_in(tokens: tuple[str, ...], form: str) -> None:
    assert fill_in_form({one: 1 for one in tokens}.get) == form


def test_what_closes_an_earlier_answer_is_the_templates(tmp_path: Path) -> None:
    """The next turn begins where the answer ended: with the mark of its end, and no system's message again."""
    text = ModelText(make_model_dir(tmp_path, HERMES))
    ids = byte_tokenizer().encode
    found = text.prompt([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], CONTEXT, after=[1, 2])
    assert found == [1, 2, *ids("<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n").ids]
    base = make_model_dir(tmp_path / "base", template=None)
    begins = byte_tokenizer()
    begins.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", END)])
    begins.save(str(base / "tokenizer.json"))
    said = [{"role": "user", "content": "u"}]
    assert ModelText(base).prompt(said, CONTEXT) == [END, *ids("u").ids]
    assert ModelText(base).prompt(said, CONTEXT, after=[1, 2]) == [1, 2, *ids("u").ids], "no second beginning"
    with pytest.raises(PromptLengthError, match="bytes"):
        ModelText(base).prompt("x" * 30, CONTEXT, after=[1] * (CONTEXT - 3))
