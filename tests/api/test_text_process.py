"""Foreign templates and tokenizers in their own process: what they may not take, and that nobody else suffers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from peerllm import chat_templates
from peerllm.api.server import ApiServer
from peerllm.api.text import model_text, text_process, text_store
from peerllm.api.text.text_bounds import bounds_of
from peerllm.api.text.text_store import AnswerText, TextStore
from peerllm.errors import BadInputError, ModelError
from tests.api.fake import BOUND_S, CONTEXT, FakeHousehold, byte_tokenizer, make_model_dir
from tests.api.test_text import TOKENIZERS
from tests.sizes import examples

HI: Any = [{"role": "user", "content": "hi"}]
DOUBLING = (
    "{% set ns = namespace(s='x' * 1024) %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
)
ENDLESS = "{{ 'x' | replace('', 'y' * 9999) | wordwrap(1) | wordwrap(1) | length }}{% for i in range(99999) %}" * 3 + (
    "{% endfor %}" * 3
)


@pytest.fixture
async def store() -> AsyncIterator[TextStore]:
    one = TextStore()
    yield one
    await one.close()


async def text_of(store: TextStore, directory: Path) -> AnswerText:
    return await store.model(directory.name, directory)


def pid(store: TextStore) -> int:
    found = store._small.pid
    assert found is not None
    return found


async def test_a_prompt_and_its_answers_text(store: TextStore, tmp_path: Path) -> None:
    text = await text_of(store, make_model_dir(tmp_path / "model", generation={"top_k": 5}))
    ids = await store.prompt(text, HI, CONTEXT)
    assert byte_tokenizer().decode(ids, skip_special_tokens=False) == "<s><|user|>hi<|end|>\n<|assistant|>"
    assert text.detokenizer(frozenset()).push(ids) == "<s><|user|>hi\n<|assistant|>", "<|end|> is special"
    assert text.defaults["top_k"] == 5


async def test_it_holds_no_large_libraries(store: TextStore, tmp_path: Path) -> None:
    await text_of(store, make_model_dir(tmp_path / "model"))
    loaded = [one.path for one in psutil.Process(pid(store)).memory_maps()]
    assert [path for path in loaded if "tokenizers" in path]
    large = ("libtorch", "onnxruntime", "numpy", "aiohttp", "_ssl")
    assert not [path for path in loaded if any(name in path for name in large)]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
async def test_a_template_that_doubles_a_string_is_one_clear_error(
    store: TextStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_process, "MEMORY_BYTES", 256 << 20)  # it is sooner there
    bad = await text_of(store, make_model_dir(tmp_path / "bad", template=DOUBLING))
    good = await text_of(store, make_model_dir(tmp_path / "good"))
    with pytest.raises(BadInputError, match="takes more than 256 MiB of memory"):
        await store.prompt(bad, HI, CONTEXT)
    assert await store.prompt(good, HI, CONTEXT)


async def test_what_takes_too_long_is_ended(store: TextStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one call would that no bound inside the process reaches."""
    text = await text_of(store, make_model_dir(tmp_path / "model"))
    before = pid(store)
    monkeypatch.setattr(text_process, "PREPARE_S", 0.0)
    with pytest.raises(BadInputError, match="takes longer than 0 s"):
        await store.prompt(text, HI, CONTEXT)
    monkeypatch.undo()
    assert not psutil.pid_exists(before)
    assert await store.prompt(text, HI, CONTEXT), "another process was started"


async def test_a_process_that_dies_costs_one_request(store: TextStore, tmp_path: Path) -> None:
    text = await text_of(store, make_model_dir(tmp_path / "model"))
    os.kill(pid(store), 9)
    answers = await asyncio.gather(*(store.prompt(text, HI, CONTEXT) for _ in range(4)), return_exceptions=True)
    assert len([one for one in answers if isinstance(one, BaseException)]) <= 1
    assert len(answers[-1]) > 5  # type: ignore[arg-type]


async def test_a_client_that_leaves_does_not_mix_up_answers(store: TextStore, tmp_path: Path) -> None:
    text = await text_of(store, make_model_dir(tmp_path / "model"))
    first = asyncio.create_task(store.prompt(text, HI, CONTEXT))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    other: Any = [{"role": "user", "content": "something longer"}]
    ids = await store.prompt(text, other, CONTEXT)
    assert "something longer" in byte_tokenizer().decode(ids)


async def test_clients_that_leave_before_their_turn_leave_nothing_behind(store: TextStore, tmp_path: Path) -> None:
    text = await text_of(store, make_model_dir(tmp_path / "model"))
    await store._small._turn.acquire()  # as if a prompt were being prepared
    leaving = [asyncio.create_task(store.prompt(text, HI, CONTEXT)) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    assert not store._small._tasks and not store._waiting
    store._small._turn.release()
    assert await asyncio.wait_for(store.prompt(text, HI, CONTEXT), BOUND_S)


async def test_who_asks_much_waits_behind_itself(store: TextStore, tmp_path: Path) -> None:
    text = await text_of(store, make_model_dir(tmp_path / "model"))
    done: list[str] = []

    async def ask(asker: str) -> None:
        await store.prompt(text, HI, CONTEXT, asker)
        done.append(asker)

    await store._small._turn.acquire()  # as if a prompt were being prepared
    tasks = [asyncio.create_task(ask(asker)) for asker in ("greedy", "greedy", "greedy", "modest", "greedy")]
    for _ in range(5):
        await asyncio.sleep(0)
    store._small._turn.release()
    await asyncio.wait_for(asyncio.gather(*tasks), BOUND_S)
    assert done.index("modest") == 1 and not store._turns


async def test_it_is_told_no_secrets(store: TextStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PLAIN"):
        monkeypatch.setenv(name, "x")
    await text_of(store, make_model_dir(tmp_path / "model"))
    told = psutil.Process(pid(store)).environ()
    assert "PLAIN" in told and not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} & told.keys()


async def test_an_idle_process_ends(store: TextStore, tmp_path: Path) -> None:
    text = await text_of(store, make_model_dir(tmp_path / "model"))
    process = psutil.Process(pid(store))
    store._small._idle_s = 0.01
    assert await store.prompt(text, HI, CONTEXT)
    await asyncio.to_thread(process.wait, BOUND_S)
    assert await store.prompt(text, HI, CONTEXT)


async def test_large_prompts_keep_small_ones_from_waiting(
    store: TextStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_store, "LARGE_CHARS", 100)
    text = await text_of(store, make_model_dir(tmp_path / "model"))
    await store._large._turn.acquire()  # as if one were being prepared
    large = asyncio.create_task(store.prompt(text, [{"role": "user", "content": "x" * 101}], 1024))
    assert await asyncio.wait_for(store.prompt(text, HI, CONTEXT), BOUND_S)
    assert not large.done()
    store._large._turn.release()
    assert len(await asyncio.wait_for(large, BOUND_S)) > 101


async def test_closing_ends_it_even_at_work(tmp_path: Path) -> None:
    store = TextStore()
    await text_of(store, make_model_dir(tmp_path / "model"))
    process = psutil.Process(pid(store))
    await store.close()
    await store.close()
    assert not process.is_running()


async def test_files_are_bounded_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TextStore(in_process=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        directory = make_model_dir(tmp_path / name)
        with monkeypatch.context() as patch:
            if name == "tokenizer.json":
                patch.setattr(model_text, "MAX_TOKENIZER_BYTES", 10)
            else:
                patch.setattr(chat_templates.model_file, "__defaults__", (10,))
            with pytest.raises(ModelError, match=f"{name} is larger than 10 bytes"):
                await text_of(store, directory)
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "tokenizer.json")
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        await text_of(store, tmp_path / "fifo")
    await store.close()


# ---- refusing by size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "byte fallback"])
@settings(max_examples=examples(150))
@given(text=st.text(max_size=200) | st.text(" \n\te\u0301\u1100\u1161\u11a8", max_size=200))
def test_a_text_that_fits_is_never_refused(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    bounds = bounds_of(json.loads(tokenizer.to_str()))
    assert bounds.token_bytes
    assert not bounds.too_long(text, len(tokenizer.encode(text, add_special_tokens=False).ids))


def changed(**parts: Any) -> Tokenizer:
    """A token for each byte, and none that is longer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


NFC = changed(normalizer=normalizers.NFC())
STRIPPING = byte_tokenizer()
STRIPPING.add_special_tokens([AddedToken("<|x|>", special=True, lstrip=True, rstrip=True)])


@settings(max_examples=examples(100))
@given(text=st.text("e\u0301\u1100\u1161\u11a8\u0344\u03b1\u0313\u0300\u0345 ", max_size=60))
def test_composed_characters_are_no_surprise(text: str) -> None:
    bounds = bounds_of(json.loads(NFC.to_str()))
    assert bounds.token_bytes
    assert not bounds.too_long(text, len(NFC.encode(text).ids))


@settings(max_examples=examples(100))
@given(parts=st.lists(st.sampled_from(["<|x|>", " " * 9, "a", "\n"]), max_size=40))
def test_spaces_that_a_special_token_takes_are_no_surprise(parts: list[str]) -> None:
    bounds, text = bounds_of(json.loads(STRIPPING.to_str())), "".join(parts)
    assert bounds.token_bytes
    assert not bounds.too_long(text, len(STRIPPING.encode(text).ids))


@pytest.mark.parametrize("tokenizer", [
    TOKENIZERS["metaspace"], TOKENIZERS["wordpiece"], TOKENIZERS["plain"], changed(normalizer=normalizers.Strip()),
    changed(normalizer=normalizers.Replace("ab", "c")), changed(normalizer=normalizers.NFKC()),
    changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])),
    changed(pre_tokenizer=pre_tokenizers.Whitespace()), changed(pre_tokenizer=None),
])  # fmt: skip
def test_where_text_may_vanish_nothing_is_certain(tokenizer: Tokenizer) -> None:
    bounds = bounds_of(json.loads(tokenizer.to_str()))
    assert not bounds.token_bytes and not bounds.too_long("x" * 10**6, 1)


@pytest.mark.parametrize("file", [b"{}", b'{"model": 3}', b'{"model": {"type": "BPE", "vocab": []}}'])
def test_odd_files_have_no_bound(file: bytes) -> None:
    assert bounds_of(orjson.loads(file)).token_bytes == 0


# ---- attacks, with a stream running -------------------------------------------------------------------------------

PATH = "/v1/chat/completions"
QUIET_S = 2.0  # seconds that a stream's tokens may stay away while others misbehave, on a busy machine


@pytest.mark.parametrize("template", [None, DOUBLING, ENDLESS], ids=["large prompts", "doubling", "endless"])
async def test_streams_go_on_while_others_misbehave(
    household: FakeHousehold, tmp_path: Path, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_process, "MEMORY_BYTES", 256 << 20)
    if template is not None:
        monkeypatch.setattr(text_process, "PREPARE_S", 0.5)
    server = ApiServer(household, "127.0.0.1", 0, tmp_path / "data")
    await server.start()
    household.endless, household.pace_s = True, 0.01
    ask: Any = {"model": "builtin", "messages": HI, "stream": True}
    gaps: list[float] = []

    async def listen(session: aiohttp.ClientSession, begun: asyncio.Event) -> None:
        async with session.post(PATH, json=ask) as response:
            last = asyncio.get_running_loop().time()
            async for _ in response.content.iter_any():
                begun.set()
                now = asyncio.get_running_loop().time()
                gaps.append(now - last)
                last = now

    try:
        async with aiohttp.ClientSession(server.url) as session:
            begun = [asyncio.Event() for _ in range(4)]
            listening = [asyncio.create_task(listen(session, one)) for one in begun]
            async with asyncio.timeout(BOUND_S):
                for one in begun:
                    await one.wait()
            gaps.clear()
            if template is not None:
                (tmp_path / "model" / "chat_template.jinja").write_text(template)
                await server_texts_forget(server)
            for size in (300_000, 7_000_000) if template is None else (2,):
                body = {**ask, "messages": [{"role": "user", "content": "x" * size}]}
                async with asyncio.timeout(2 * BOUND_S), session.post(PATH, json=body) as response:
                    error = (await response.json())["error"]
                assert response.status == 400 and error["message"]
                if template is None:
                    assert error["code"] == "context_length_exceeded" and f"has {size + 32} bytes" in error["message"]
            assert all(not one.done() for one in listening) and max(gaps) < QUIET_S
            for one in listening:
                one.cancel()
            await asyncio.gather(*listening, return_exceptions=True)
    finally:
        await server.close()


async def server_texts_forget(server: ApiServer) -> None:
    """The model's files are read again."""
    from peerllm.api.keys import TEXTS

    assert server._runner is not None and server._runner.app is not None
    texts = server._runner.app[TEXTS]
    texts._texts.clear()
    await texts._small._end()


async def test_numbers_of_any_size_reach_the_process(store: TextStore, tmp_path: Path) -> None:
    text = await text_of(store, make_model_dir(tmp_path / "model", template="{{ tools }}"))
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"most": 2**70}}}]
    ids = await store.prompt(text, HI, 10_000, tools=tools)
    assert "1.1805916207174113e+21" in byte_tokenizer().decode(ids)
