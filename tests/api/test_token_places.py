"""Every token of an answer has its exact bytes, and comes with the words that it is of, whatever the model's form."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from peerllm.api.core.growing_answer import GrowingAnswer
from peerllm.api.core.part_events import MAX_TOLD, PartEvents
from peerllm.api.text.calls.answer_parts import AnswerReader, ToldToken, Words
from peerllm.api.text.calls.call_forms import FORMS
from peerllm.api.text.calls.call_reader import CallReader
from peerllm.api.text.calls.harmony_reader import HarmonyReader
from peerllm.api.text.calls.thinking_reader import ThinkingReader
from peerllm.api.text.detokenizer import Detokenizer
from peerllm.api.text.reasoning import ReasoningSplitter
from peerllm.api.text.stops import StopScanner
from peerllm.api.text.tokens.token_bytes import TokenBytes
from peerllm.api.text.tokens.token_places import TokenPlaces
from peerllm.builtin import MODEL_DIR
from peerllm.chat_templates import MARKS
from peerllm.logprobs import packed
from tests.sizes import examples

CALL = '{"name": "weather", "arguments": {"city": "a"}}'
TEXTS = ("Hello, wörld 🏡!", " two  spaces", "\n\n\tlines\r\n", "日本語 und ﷽", "🏴󠁧󠁢󠁳󠁣󠁴󠁿👩‍👩‍👧", "a<b>c</b> <|e", "")


def sentencepiece(*decoder: Any) -> Tokenizer:
    """Words with their space before them, and bytes for what is in no word, as Llama 2, Mistral and Gemma have them."""
    words = ["<unk>", *(f"<0x{one:02X}>" for one in range(256)), "▁", "▁a", "a", "▁Hello", "Hello", ",", "▁w"]
    words += ["rld", "t<t", "e<|e"]
    tokenizer = Tokenizer(models.BPE({one: at for at, one in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *decoder])
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


STRIPPING = sentencepiece(decoders.Fuse(), decoders.Strip(" ", 1, 0))
FUSING = sentencepiece(decoders.Fuse())
BUILTIN = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
END = BUILTIN.token_to_id("<|end|>")


def answer(
    tokenizer: Tokenizer, reader: AnswerReader | None = None, stops: tuple[str, ...] = (), silent: int = -1
) -> GrowingAnswer:
    reader = reader or ThinkingReader(ReasoningSplitter(None, False))
    places = TokenPlaces(TokenBytes(tokenizer))
    return GrowingAnswer(Detokenizer(tokenizer, frozenset([silent])), StopScanner(stops), reader, places)


def grown(growing: GrowingAnswer, ids: list[int], chunk: int = 1) -> list[Words]:
    found: list[Any] = []
    logprobs = [packed([(one, -at / 64), (one, -0.5)]) for at, one in enumerate(ids)]
    for start in range(0, len(ids), chunk):
        piece = slice(start, start + chunk)
        found += growing.feed(ids[piece], None, 0, logprobs[piece])
    found += growing.feed((), "length")
    return [one for one in found if isinstance(one, Words)]


def check(ids: list[int], words: list[Words]) -> str:
    """The text; its tokens' bytes, joined, are its own, and each begins where it says."""
    text, tokens = "".join(one.text for one in words), [token for one in words for token in one.tokens]
    assert b"".join(one.data for one in tokens) == text.encode()
    ends = 0
    for one in tokens:
        assert one.offset == len(text.encode()[:ends].decode(errors="ignore"))
        ends += len(one.data)
    assert [one.logprob for one in tokens] == [-at / 64 for at in range(len(tokens))]
    assert all(one.likeliest == ((one.data, -0.5),) for one in tokens)
    return text


@pytest.mark.parametrize("tokenizer", [BUILTIN, STRIPPING, FUSING], ids=["builtin", "stripping", "fusing"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_all_tokens_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer is BUILTIN:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    else:
        ids = [tokenizer.token_to_id(f"<0x{one:02X}>") for one in text.encode()]
    if tokenizer is STRIPPING:
        text, ids = text.lstrip(" "), ids[len(text) - len(text.lstrip(" ")) :]
    for chunk in (1, 3, 1000):
        assert check(ids, grown(answer(tokenizer), ids, chunk)) == text


def test_a_space_before_the_first_word_is_left_out_where_the_decoder_does_so() -> None:
    ids = [STRIPPING.token_to_id(one) for one in ("▁Hello", ",", "▁w", "<0xC3>", "<0xB6>", "rld", "▁Hello")]
    assert check(ids, grown(answer(STRIPPING), ids)) == "Hello, wörld Hello"
    assert check(ids, grown(answer(FUSING), ids)) == " Hello, wörld Hello"
    places = TokenBytes(STRIPPING)
    assert [places.of(ids[0], True), places.of(ids[0]), places.of(ids[3]), places.of(10**6)] == [
        b"Hello", b" Hello", b"\xc3", b"",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(examples(4)))
def test_any_ids_have_bytes_that_are_decoded_as_their_text(seed: int) -> None:
    chance, places = random.Random(seed), TokenBytes(BUILTIN)
    ids = [chance.randrange(BUILTIN.get_vocab_size()) for _ in range(40)]
    data = b"".join(places.of(one, at == 0) for at, one in enumerate(ids))
    assert data.decode(errors="replace") == BUILTIN.decode(ids, skip_special_tokens=False)


def test_a_piece_of_a_character_at_the_end() -> None:
    ids = BUILTIN.encode("so 🏡", add_special_tokens=False).ids[:-1]
    words = grown(answer(BUILTIN), ids)
    data = b"".join(token.data for one in words for token in one.tokens)
    assert "so \U0001f3e1".encode().startswith(data) and len(data) > 3
    assert "".join(one.text for one in words) == "so \ufffd"


def test_tokens_without_text_are_none() -> None:
    first, *rest = BUILTIN.encode("a b c", add_special_tokens=False).ids
    words = grown(answer(BUILTIN, silent=END), [END, first, END, 10**6, *rest, END])
    assert b"".join(token.data for one in words for token in one.tokens) == b"a b c"
    assert len([token for one in words for token in one.tokens]) == 1 + len(rest)


def test_what_is_held_back_may_look_like_what_is_said() -> None:
    ids = [FUSING.token_to_id(one) for one in ("t<t", "a", "e<|e", ",", "t<t", ",")]
    for reader in (hermes(), thinker(hermes()), HarmonyReader(True)):
        assert check(ids, grown(answer(FUSING, reader), ids)) == "t<tae<|e,t<t,"


Marked = list[tuple[str, bool]]  # texts, and whether they are said


def spelt(marked: Marked) -> tuple[list[int], list[int]]:
    """Ids, and the places of those that are said."""
    ids, said = list[int](), list[int]()
    for text, is_said in marked:
        fresh = BUILTIN.encode(text, add_special_tokens=False).ids
        said += range(len(ids), len(ids) + len(fresh)) if is_said else ()
        ids += fresh
    return ids, said


def hermes(one: bool = False) -> CallReader:
    return CallReader(FORMS["tagged objects"], {"weather": {}}, one)


def thinker(calls: CallReader | None = None) -> ThinkingReader:
    return ThinkingReader(ReasoningSplitter(MARKS[0], False), calls)


THOUGHT: Marked = [("<think>", False), ("\nso the think</thing", False), ("\n", False), ("</think>", False)]
CALLING: Marked = [("<tool_call>", False), (f"\n{CALL}\n", False), ("</tool_call>", False)]


@pytest.mark.parametrize(
    ("reader", "marked"),
    [
        (thinker, [("  hello", True), (" <think>", True), ("a", True)]),
        (thinker, [*THOUGHT, ("\n\n", False), ("think", True), (" thing", True)]),
        (thinker, [*THOUGHT, ("t", True)]),
        (thinker, THOUGHT[:2]),
        (hermes, [("tool", True), ("\n", False), *CALLING, ("\n", False), ("call", True), (" <tool", True)]),
        (hermes, [("<tool_call>", True), (" no", True), (" {", True), ("tool", True)]),
        (hermes, [*CALLING, ("\n", False), *CALLING, (" ", False)]),
        (hermes, [("_call", True), ("\n", False), *CALLING, *CALLING, ("tool_call", True)]),
        (lambda: hermes(True), [("x", True), *CALLING, ("y", False)]),
        (lambda: thinker(hermes()), [*THOUGHT, ("\n", False), ("so", True), (" ", False), *CALLING, ("so", True)]),
        (
            lambda: HarmonyReader(True),
            [
                ("<|channel|>analysis<|message|>", False), ("message", False), ("<|end|>", False),
                ("<|start|>assistant<|channel|>final<|message|>", False), ("final", True), (" message<|", True),
            ],
        ),
        (
            lambda: HarmonyReader(True),
            [
                ("<|channel|>commentary to=functions.weather<|message|>", False), ('{"city": "a"}', False),
                ("<|call|>", False), ("<|start|>assistant<|channel|>final<|message|>", False), ("a", True),
            ],
        ),
    ],
)  # fmt: skip
def test_only_what_is_said_has_tokens(reader: Any, marked: Marked) -> None:
    ids, said = spelt(marked)
    for chunk in (1, 2, 1000):
        words = grown(answer(BUILTIN, reader()), ids, chunk)
        tokens = [token for one in words for token in one.tokens]
        assert [round(-64 * one.logprob) for one in tokens] == said
        assert not any(one.tokens for one in words if one.thought)
        text = "".join(one.text for one in words if not one.thought)
        assert b"".join(one.data for one in tokens).decode().split() == text.split()
        for one in tokens:  # space around marks is left out
            assert text[one.offset :].encode().startswith((one.data, one.data.lstrip()))


@pytest.mark.parametrize("stop", ["lo wor", "world", " ", "o"])
def test_behind_a_stop_string_there_are_none(stop: str) -> None:
    ids = BUILTIN.encode("hello world, hello world", add_special_tokens=False).ids
    growing = answer(BUILTIN, stops=(stop,))
    words = grown(growing, ids)
    text, tokens = "".join(one.text for one in words), [token for one in words for token in one.tokens]
    assert text == "hello world, hello world".partition(stop)[0]
    data = b"".join(one.data for one in tokens).decode()
    assert (data.startswith(text) and data.removesuffix(tokens[-1].data.decode() if tokens else "") != text) or not text


def test_very_many_tokens_are_told_in_several_events() -> None:
    tokens = tuple(ToldToken(b"ab", -0.5, 7 + 2 * at) for at in range(2 * MAX_TOLD + 9))
    events: Any = list(PartEvents("x").of([Words("ab" * len(tokens), tokens=tokens)], list(range(len(tokens)))))
    assert [len(one.logprobs) for one in events] == [MAX_TOLD, MAX_TOLD, 9]
    assert [len(one.text) for one in events] == [2 * MAX_TOLD, 2 * MAX_TOLD, 18]
    assert [len(one.ids) for one in events] == [0, 0, len(tokens)]
    assert tuple(token for one in events for token in one.logprobs) == tokens


def test_a_tokenizer_without_a_decoder(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    assert TokenBytes(tokenizer).of(1).strip() == b"b"
