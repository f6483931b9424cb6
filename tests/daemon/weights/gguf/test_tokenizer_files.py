"""Tokenizers from GGUF metadata: the same ids as the tokenizers they were made from, and text that comes back."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from peerllm.api.text.model_text import ModelText
from peerllm.daemon.weights.gguf import merges, token_table
from peerllm.daemon.weights.gguf.token_table import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from peerllm.daemon.weights.gguf.tokenizer_files import stop_ids, tokenizer_files
from peerllm.errors import ModelError
from tests.sizes import examples

CORPUS = (
    "The house at the sea: 3 rooms, 12 windows and 2026 books. It's there, isn't it? IT'S HERE!",
    "Das Haus am Meer hat drei Zimmer, größer als früher; où est-il? Ça c'est déjà vu.",
    "while (x == 10) {\n    return x + 1;\n}\n\n\n// ---- ==== ----\n\t\tend",
    "家里有一台电脑。わたしは日本語を話す。집에 컴퓨터가 있다. дом у моря 🏡🏡 e\u0301te\u0301",
)
TEXT = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*" \n\t'.,!=-3", "the", "House", "'s", "'LL", "12345", "  ", "é", "e\u0301", "家", "🏡"])
    ).map("".join),
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
ORIGINALS: dict[str, tuple[Any, Any]] = {  # how the makers of each wrote it: normalizer, words
    "gpt-2": (None, WORDS),
    "olmo": (normalizers.NFC(), WORDS),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])),
    "command-r": (normalizers.NFC(), pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS])),
    "llama-bpe": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES])),
    "falcon": (
        None,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                WORDS,
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        ),
    ),
}
WHOLE_WORDS = ("llama-bpe", "tekken")


@cache
def byte_level(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in WHOLE_WORDS))
    normalizer, tokenizer.pre_tokenizer = ORIGINALS[pre]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("   ", normalized=False)])
    return tokenizer


def gpt2_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """As converters write it."""
    size = tokenizer.get_vocab_size()
    added = tokenizer.get_added_tokens_decoder()
    kinds = [NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED for i in range(size)]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokenizer.id_to_token(i) for i in range(size)],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": np.uint32(0),
        "tokenizer.ggml.eos_token_id": np.uint32(0),
    }


@cache
def rebuilt(pre: str) -> Tokenizer:
    return Tokenizer.from_buffer(tokenizer_files(gpt2_metadata(byte_level(pre), pre))["tokenizer.json"])


@pytest.mark.parametrize("pre", ORIGINALS)
@settings(max_examples=examples(100))
@given(pieces=st.lists(st.one_of(TEXT, st.sampled_from(["<|im_end|>", "<think>", "   "])), max_size=5))
def test_byte_level_ids_are_the_originals(pre: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = rebuilt(pre).encode(text, add_special_tokens=False).ids
    assert ids == byte_level(pre).encode(text, add_special_tokens=False).ids
    composed = ORIGINALS[pre][0]
    if composed is None:
        assert rebuilt(pre).decode(ids, skip_special_tokens=False) == text


SPLITS = {  # texts and the words they are cut into
    "qwen2": ("We'RE 123  e\u0301!?\n\n x", ["We", "'RE", " ", "1", "2", "3", " ", " é", "!?\n\n", " x"]),
    "deepseek-r1-qwen": ("a 12 e\u0301", ["a", " ", "1", "2", " e", "\u0301"]),
    "qwen35": ("नमस्ते 12", ["नमस्ते", " ", "1", "2"]),
    "gpt-4o": ("HouseABc's 12345/\n", ["House", "ABc's", " ", "123", "45", "/\n"]),
    "tekken": ("HouseAB's 12/\n", ["House", "AB", "'s", " ", "1", "2", "/\n"]),
    "glm4": ("a 12345", ["a", " ", "123", "45"]),
    "deepseek-llm": ("Haus  ab, 123家 \n", ["Haus", " ", " ab", ",", " ", "123", "家", " ", "\n"]),
    "deepseek-coder": ("ab, 123家\n", ["ab", ",", " ", "1", "2", "3", "家", "\n"]),
    "deepseek-v3": ("a 1234家x .b\n", ["a", " ", "123", "4", "家", "x", " .", "b", "\n"]),
    "seed-coder": ("a!\n1", ["a", "!", "\n", "1"]),
    "bailingmoe": ("it's\n\n12", ["it", "'s", "\n\n", "1", "2"]),
    "exaone-moe": ("a!\n\n12", ["a", "!\n", "\n", "1", "2"]),
    "minicpm5": ("a 1234", ["a", " ", "123", "4"]),
}


@pytest.mark.parametrize("pre", SPLITS)
def test_text_is_cut_into_words(pre: str) -> None:
    text, words = SPLITS[pre]
    tokenizer = Tokenizer.from_buffer(tokenizer_files(gpt2_metadata(byte_level("gpt-2"), pre))["tokenizer.json"])
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    cut = [spelled for spelled, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert [tokenizer.decoder.decode([one]) for one in cut] == words


def test_a_word_that_is_a_token_is_not_built_by_merges() -> None:
    metadata = gpt2_metadata(byte_level("gpt-2"), "llama-bpe")
    metadata["tokenizer.ggml.merges"] = []
    number = metadata["tokenizer.ggml.tokens"].index("Ġthe")
    assert Tokenizer.from_buffer(tokenizer_files(metadata)["tokenizer.json"]).encode(" the").ids == [0, number]


PIECES = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))


@cache
def sentence_pieces() -> tuple[list[str], list[float]]:
    """Pieces and scores, as SentencePiece orders them: what was merged first is best, single characters come last."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(CORPUS[:3] * 2, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"]))
    merged = ["".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merged = list(dict.fromkeys(merged))
    single = sorted(set(tokenizer.get_vocab()) - set(merged) - {"<unk>"})
    tokens = [*PIECES, *merged, *single]
    return tokens, [0.0] * len(PIECES) + [-float(i) for i in range(len(merged) + len(single))]


def spm_metadata(**changes: Any) -> dict[str, Any]:
    tokens, scores = sentence_pieces()
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - len(PIECES))]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def spm_ids(text: str) -> list[int]:
    """SentencePiece's rule: of all neighbours that make a piece, join those that make the best; leftmost of equals."""
    tokens, scores = sentence_pieces()
    best = {token: score for token, score in zip(tokens[len(PIECES) :], scores[len(PIECES) :], strict=True)}
    symbols = list(text.replace(" ", "▁"))
    while joined := [(-best[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in best]:
        _, at = min(joined)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    spelled = [[one] if one in best else [f"<0x{byte:02X}>" for byte in one.encode()] for one in symbols]
    return [tokens.index(one) for some in spelled for one in some]


@cache
def spm_tokenizer(prefix: bool) -> Tokenizer:
    return Tokenizer.from_buffer(tokenizer_files(spm_metadata(add_space_prefix=prefix))["tokenizer.json"])


@pytest.mark.parametrize("prefix", [True, False])
@settings(max_examples=examples(100))
@given(text=TEXT, after=TEXT)
def test_sentence_piece_ids_are_those_of_its_rule(prefix: bool, text: str, after: str) -> None:
    tokenizer, space = spm_tokenizer(prefix), " " * prefix
    ids = tokenizer.encode(f"{text}<s>{after}").ids
    expected = [spm_ids(space + one) if one else [] for one in (text, after)]
    assert ids == [1, *expected[0], 1, *expected[1]]
    if text and "▁" not in text:
        assert tokenizer.decode(expected[0]) == text


def test_tokens_are_found_in_text_as_their_kind_says() -> None:
    metadata = spm_metadata()
    metadata["general.architecture"] = "phi3"
    metadata["tokenizer.ggml.tokens"] = [
        *metadata["tokenizer.ggml.tokens"],
        "<|user|>",
        "<b>",
        "[PAD9]",
        "<|end|>",
        "<EOT>",
    ]
    metadata["tokenizer.ggml.token_type"] = [
        *metadata["tokenizer.ggml.token_type"],
        CONTROL,
        USER_DEFINED,
        5,
        NORMAL,
        USER_DEFINED,
    ]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], *[-1000.0] * 5]
    tokenizer = Tokenizer.from_buffer(tokenizer_files(metadata)["tokenizer.json"])
    count = tokenizer.get_vocab_size()
    user, bold, padding, end, turn = range(count - 5, count)
    added = tokenizer.get_added_tokens_decoder()
    assert set(added) == {0, 1, 2, user, bold, end, turn} and padding not in added
    assert {number for number, one in added.items() if not one.special} == {bold}
    the = spm_ids(" the")
    assert tokenizer.encode("<|user|>\n <s><|end|>the<b>the").ids == [1, user, 1, end, *the, bold, *the]
    assert tokenizer.encode("<s> the").ids == [1, 1, *spm_ids("  the")]
    assert tokenizer.decode([bold, *the, user]) == "<b> the"
    metadata["general.architecture"] = "llama"
    tokenizer = Tokenizer.from_buffer(tokenizer_files(metadata)["tokenizer.json"])
    assert tokenizer.encode("<|user|> the").ids == [1, user, *spm_ids("  the")]
    byte_level_phi = GPT2 | {"general.architecture": "phi3"}
    tokenizer = Tokenizer.from_buffer(tokenizer_files(byte_level_phi)["tokenizer.json"])
    assert tokenizer.decode(tokenizer.encode("<|im_end|> the").ids, skip_special_tokens=False) == "<|im_end|> the"


def test_pieces_of_one_score_are_merged_in_their_order() -> None:
    tokens, _ = sentence_pieces()
    alike = Tokenizer.from_buffer(tokenizer_files(spm_metadata(scores=[0.0] * len(tokens)))["tokenizer.json"])
    for line in CORPUS:
        assert alike.encode(line).ids == spm_tokenizer(True).encode(line).ids


def test_gemma_4_merges_pieces_by_a_list() -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *PIECES[3:], "▁", "a", "b", "\n", "\n\n", "▁a", "▁ab", "\n\n\n"]
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[CONTROL] * 4, *[BYTE] * 256, *[NORMAL] * 8],
        "tokenizer.ggml.merges": ["▁ a", "\n \n", "▁a b", "\n\n \n"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    tokenizer = Tokenizer.from_buffer(tokenizer_files(metadata)["tokenizer.json"])
    encoded = tokenizer.encode(" abé\n\n\n")
    assert encoded.tokens == ["<bos>", "▁ab", "<0xC3>", "<0xA9>", "\n\n\n"]
    assert tokenizer.decode(encoded.ids) == " abé\n\n\n"


def test_a_model_directory_reads_text(tmp_path: Path) -> None:
    metadata = spm_metadata(padding_token_id=0, add_eos_token=True)
    messages = [{"role": "user", "content": "the house"}]
    for name, content in tokenizer_files(metadata).items():
        (tmp_path / name).write_bytes(content)
    assert ModelText(tmp_path).prompt(messages, 100) == [1, *spm_ids(" the house"), 2]
    metadata["tokenizer.chat_template"] = (
        "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}{{ pad_token }}"
    )
    for name, content in tokenizer_files(metadata).items():
        (tmp_path / name).write_bytes(content)
    assert ModelText(tmp_path).prompt(messages, 100) == [1, *spm_ids(" the house"), 2, 0]


def named(*tokens: str, **changes: Any) -> dict[str, Any]:
    ids = {f"tokenizer.ggml.{name}_token_id": number for name, number in changes.items()}
    kinds = [CONTROL if token[0] in "<[" else NORMAL for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*tokens],
        "tokenizer.ggml.token_type": kinds,
        **ids,
    }


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (named("a", "<|endoftext|>", "<|im_end|>", eos=2), (2, 1)),
        (named("a", "<x>", "<y>", "<z>", eos=3, eot=1, eom=2), (3, 1, 2)),
        (named("a", "b"), ()),
        (named("<|end|>", "<|return|>", "<|call|>", eos=1), (1, 2)),
        (named("<|end|>", "<|return|>", eos=1), (1, 0)),
        (named("<|end|>", "<|calls|>", "<|flush|>"), (1, 2)),
        (named("<end_of_turn>", "<eos>", "</s>", eos=1), (1, 0, 2)),
        (named("<end_of_turn>", "<eos>", "</s>", eos=1) | {"tokenizer.ggml.token_type": [3, 3, 4]}, (1, 0)),
        (spm_metadata(), (2,)),
    ],
)
def test_stop_tokens(metadata: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert stop_ids(metadata) == expected


GPT2 = gpt2_metadata(byte_level("gpt-2"), "gpt-2")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "kind"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokens is not a list"),
        (GPT2 | {"tokenizer.ggml.tokens": []}, "no tokens"),
        (GPT2 | {"tokenizer.ggml.tokens": [b"a"]}, "tokens is not a list"),
        (GPT2 | {"tokenizer.ggml.tokens": ["a", "a"]}, "twice"),
        (GPT2 | {"tokenizer.ggml.token_type": [1]}, "one number for each"),
        (GPT2 | {"tokenizer.ggml.token_type": ["x"] * len(GPT2["tokenizer.ggml.tokens"])}, "one number for each"),
        (GPT2 | {"tokenizer.ggml.token_type": [""] * 10**5 + ["x" * 10**5]}, "one number for each"),
        (GPT2 | {"tokenizer.ggml.eos_token_id": 10**6}, "eos token is 1000000"),
        (GPT2 | {"tokenizer.ggml.eos_token_id": "0"}, "eos token is 0"),
        (GPT2 | {"tokenizer.ggml.pre": None}, "does not say how"),
        (GPT2 | {"tokenizer.ggml.pre": "default"}, "does not say how"),
        (GPT2 | {"tokenizer.ggml.pre": "kimi-k2"}, "unknown way: tokenizer.ggml.pre is 'kimi-k2'"),
        (GPT2 | {"tokenizer.ggml.pre": ["gpt-2"]}, "unknown way"),
        (GPT2 | {"tokenizer.ggml.merges": None}, "merges is not a list"),
        (GPT2 | {"tokenizer.ggml.merges": ["th"]}, "merges 'th'"),
        (GPT2 | {"tokenizer.ggml.merges": ["t 家"]}, "merges 't 家'"),
        (GPT2 | {"tokenizer.ggml.merges": ["! !"]}, "merges '! !'"),
        (GPT2 | {"tokenizer.ggml.merges": ["家 t"]}, "merges '家 t'"),
        (GPT2 | {"tokenizer.ggml.add_bos_token": 1}, "neither true nor false"),
        (
            {k: v for k, v in GPT2.items() if "bos" not in k} | {"tokenizer.ggml.add_bos_token": True},
            "adds a token bos",
        ),
        (GPT2 | {"tokenizer.chat_template": "\ud800"}, "not UTF-8"),
        (spm_metadata(scores=None), "scores are missing"),
        (spm_metadata(scores=[0.0]), "one number for each"),
        (spm_metadata(scores=[float("nan")] * len(sentence_pieces()[0])), "not numbers"),
        (spm_metadata(add_space_prefix="no"), "neither true nor false"),
        (spm_metadata(tokens=[*sentence_pieces()[0][:-1], "x" * 513]), "one has more than 512"),
    ],
)
def test_what_cannot_be_read_gets_one_line(metadata: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=r"\A[^\n]*\Z") as caught:
        tokenizer_files(metadata)
    assert said in str(caught.value)


@pytest.mark.parametrize(("bound", "value"), [("MAX_TOKENS", 100), ("MAX_CHARS", 500)])
def test_long_lists_are_refused(monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> None:
    monkeypatch.setattr(token_table, bound, value)
    with pytest.raises(ModelError, match="tokens has over"):
        tokenizer_files(GPT2)


def test_too_many_characters_to_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "MAX_SPLITS", 1000)
    with pytest.raises(ModelError, match="more than 1000 characters"):
        tokenizer_files(spm_metadata())


def test_tokens_without_text_keep_their_places() -> None:
    changes: dict[str, Any] = {
        "tokenizer.ggml.tokens": [*GPT2["tokenizer.ggml.tokens"], "", "", "<last>"],
        "tokenizer.ggml.token_type": [*GPT2["tokenizer.ggml.token_type"], NORMAL, NORMAL, CONTROL],
    }
    tokenizer = Tokenizer.from_buffer(tokenizer_files(GPT2 | changes)["tokenizer.json"])
    assert tokenizer.encode("<last>").ids == [len(GPT2["tokenizer.ggml.tokens"]) + 2]


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.lists(st.text(max_size=3), max_size=5), st.lists(st.integers(-(2**40), 2**40), max_size=5),
    st.sampled_from(["gpt2", "llama", "gemma4", "gpt-2"]),
)  # fmt: skip


@settings(max_examples=examples(100))
@given(st.dictionaries(st.sampled_from([*GPT2, *spm_metadata(), "tokenizer.chat_template"]), VALUES), st.booleans())
def test_metadata_of_any_kind_is_read_or_refused(changes: dict[str, Any], scored: bool) -> None:
    try:
        files = tokenizer_files((spm_metadata() if scored else GPT2) | changes)
    except ModelError:
        return
    Tokenizer.from_buffer(files["tokenizer.json"])


def test_more_merges_than_any_model_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "MAX_MERGE_CHARS", 100)
    with pytest.raises(ModelError, match="merged in more ways"):
        tokenizer_files(spm_metadata(tokens=[*sentence_pieces()[0][:-20], *("龘" * (n + 1) for n in range(20))]))
