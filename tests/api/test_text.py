"""Templates, detokenising and stop strings; what comes in pieces equals what comes at once."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from peerllm.api.core.growing_answer import GrowingAnswer
from peerllm.api.text import template
from peerllm.api.text.calls.answer_parts import Words
from peerllm.api.text.calls.thinking_reader import ThinkingReader
from peerllm.api.text.detokenizer import Detokenizer, special_ids
from peerllm.api.text.model_text import ModelText
from peerllm.api.text.reasoning import ReasoningSplitter
from peerllm.api.text.stops import StopScanner
from peerllm.api.text.template import ChatTemplate
from peerllm.api.text.tokens.decoding_table import MAX_IDS
from peerllm.errors import BadInputError, ModelError
from tests.api.fake import CONTEXT, as_told, byte_tokenizer, make_model_dir
from tests.sizes import examples

HI = [{"role": "user", "content": "hi"}]


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: pieces with ▁ for spaces, and 256 byte tokens for the rest."""
    pieces = ["<unk>", "▁", "a", "b", "▁a", "▁ab", "é", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("▁a", -2.0), ("▁ab", -2.0), ("é", -3.0), ("▁▁", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    pieces = ["[UNK]", "un", "##able", "able", ".", "don", "'", "t", "##s", "do", "n't", ","]
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def plain_tokenizer() -> Tokenizer:
    return Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1, "�": 2, "": 3}, unk_token="a"))


TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "byte fallback": byte_fallback_tokenizer(),
    "metaspace": metaspace_tokenizer(),
    "wordpiece": wordpiece_tokenizer(),
    "plain": plain_tokenizer(),
}


TABLES = {kind: as_told(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
EMOJI_BYTES = [8 + byte for byte in "🏡é".encode()]  # as ids of the byte fallback tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=examples(400))
@given(data=st.data())
def test_pieces_joined_are_the_whole(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    one = st.integers(0, size + 2)
    if kind == "byte fallback":
        one = st.sampled_from([*range(9), *EMOJI_BYTES, 0xFF + 8])
    ids = data.draw(st.lists(one, max_size=30))
    table = TABLES[kind]
    assert table.vocabulary == size and special_ids(table) == special_ids(tokenizer)
    assert table.decode(ids) == tokenizer.decode(ids)
    assert table.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False)
    detokenizer = Detokenizer(table, special_ids(table))
    text, at = "", 0
    while at < len(ids):
        count = data.draw(st.integers(1, 3))
        text += detokenizer.push(ids[at : at + count])
        at += count
    assert text + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=examples(300))
@given(st.text(max_size=60))
def test_real_text_comes_out_at_once_and_unharmed(text: str) -> None:
    """Each character as soon as its last byte is there, and no replacement character on the way."""
    tokenizer = TOKENIZERS["bytes"]
    detokenizer, out = Detokenizer(tokenizer, special_ids(tokenizer)), ""
    for one in tokenizer.encode(text, add_special_tokens=False).ids:
        piece = detokenizer.push([one])
        assert "\ufffd" not in piece or "\ufffd" in text
        out += piece
    assert out + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert out == text


def test_skipped_ids_have_no_text() -> None:
    detokenizer = Detokenizer(byte_tokenizer(), frozenset({65}))
    assert detokenizer.push([64, 65, 66]) + detokenizer.flush() == byte_tokenizer().decode([64, 66])


def test_decoding_stays_cheap_in_a_long_answer() -> None:
    """The window is cut, so the cost of a token does not grow with the answer."""
    detokenizer = Detokenizer(byte_tokenizer(), frozenset())
    for _ in range(5000):
        detokenizer.push([64, 65])
    assert len(detokenizer._window) <= 4


def cut_at_first_stop(text: str, stops: list[str]) -> str:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@settings(max_examples=examples(1000))
@given(
    text=st.text("ab", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=20),  # the same place twice: an empty piece
)
def test_stops_do_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner, out = StopScanner(stops), ""
    for start, at in pairwise([0, *sorted(cuts), len(text)]):
        if scanner.stopped:
            break
        out += scanner.push(text[start:at])
        held = "" if scanner.stopped else text[len(out) : at]
        assert len(held) < max(map(len, stops), default=1), "holds back more than could become a stop"
    if not scanner.stopped:
        out += scanner.flush()
    assert out == cut_at_first_stop(text, stops)
    assert scanner.stopped == any(stop in text for stop in stops)


@settings(max_examples=examples(300))
@given(ids=st.lists(st.integers(0, 260), max_size=30), stops=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_detokenizer_and_stops_together(ids: list[int], stops: list[str]) -> None:
    tokenizer = TOKENIZERS["bytes"]
    whole = tokenizer.decode(ids)
    stops = [*stops, whole[3:5]] if len(whole) > 5 else stops
    detokenizer, scanner, out = Detokenizer(tokenizer, special_ids(tokenizer)), StopScanner(stops), ""
    for one in ids:
        out += scanner.push(detokenizer.push([one]))
    out += scanner.push(detokenizer.flush()) + scanner.flush()
    assert out == cut_at_first_stop(whole, stops)


# ---- templates ----------------------------------------------------------------------------------------------------


def render(source: str, messages: list[dict[str, str]] | None = None, **variables: str) -> str:
    return ChatTemplate(source, variables).render(HI if messages is None else messages)


@pytest.mark.parametrize(("source", "expected"), [
    ("{{ messages[0]['content'] }}", "hi"),
    ("{{ {'a': '<é\"'} | tojson }}", '{"a": "<é\\""}'),
    ("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}'),
    ("{% for m in messages %}\n  {{ m.role }}\n{% endfor %}", "  user\n"),
    ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{% generation %}x{% endgeneration %}y", "xy"),
    ("{{ bos_token }}|{{ missing }}|{{ tools }}", "<s>||"),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n * 3 }}", "3"),
    ("{{ '-' * 3 }}", "---"),
    ("{{ add_generation_prompt }}", "True"),
    ("{{ '<b>' }}", "<b>"),
])  # fmt: skip
def test_templates(source: str, expected: str) -> None:
    assert render(source, bos_token="<s>") == expected


@pytest.mark.parametrize(("source", "word"), [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages.append(1) }}", "failed"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed"),
    ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "failed"),
    ("{{ 'x' * 10**12 }}", "failed"),
    ("{{ 'x' * 1000000000000 }}", "failed"),
    ("{{ [1] * 1000000000 }}", "failed"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed"),
    ("{{ 1 / 0 }}", "failed"),
    ("{{ messages[0].content.nothing.here }}", "failed"),
    ("{{ range(10000000) | list }}", "failed"),
])  # fmt: skip
def test_templates_that_refuse_or_misbehave(source: str, word: str) -> None:
    with pytest.raises(BadInputError, match=word):
        render(source)


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "RENDER_TIME_S", 0.2)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(BadInputError, match="runs for more than"):
        render(loop)


def test_a_template_that_writes_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(BadInputError, match="writes more than"):
        render("{% for i in range(9999) %}some text {% endfor %}")


def test_a_template_cannot_change_the_messages() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(BadInputError):
        render("{% set _ = messages[0].update({'content': 'x'}) %}", messages)
    assert messages == HI


def test_a_broken_template_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate("{% for %}", {})


# ---- model directories --------------------------------------------------------------------------------------------


def text_of(model_text: ModelText, messages: Any = HI) -> str:
    return byte_tokenizer().decode(model_text.prompt(messages, CONTEXT), skip_special_tokens=False)


def test_a_text_begins_as_the_tokenizer_says_and_a_chat_as_the_template_does(tmp_path: Path) -> None:
    directory, tokenizer = make_model_dir(tmp_path), byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 256)])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert text_of(ModelText(directory), "hi") == "<|end|>hi"
    assert text_of(ModelText(directory)).startswith("<s>")


def test_the_template_file_comes_first(tmp_path: Path) -> None:
    make_model_dir(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("FILE {{ messages[0].content }}{{ eos_token }}")
    assert text_of(ModelText(tmp_path)) == "FILE hi<|end|>"


def test_of_several_templates_the_default(tmp_path: Path) -> None:
    make_model_dir(tmp_path, template=None)
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert text_of(ModelText(tmp_path)) == "yes"


def test_a_base_model_continues_the_text(tmp_path: Path) -> None:
    model_text = ModelText(make_model_dir(tmp_path, template=None))
    assert text_of(model_text, [*HI, {"role": "user", "content": "there"}]) == "hi\nthere"


@pytest.mark.parametrize(
    ("said", "defaults"),
    [
        (None, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"top_k": 5, "top_p": 1.0, "seed": 3}, {"top_k": 5, "top_p": 1.0}),
        ({"top_k": 5.5, "temperature": "hot", "top_p": 1.5, "min_p": True}, {}),
    ],
)
def test_sampling_follows_the_model_where_it_says_something_usable(tmp_path: Path, said: Any, defaults: Any) -> None:
    found = ModelText(make_model_dir(tmp_path / "model", generation=said)).defaults
    assert found == {"temperature": 0.7, "top_p": 0.95, **defaults}


def test_a_decoder_that_may_take_forever_is_refused(tmp_path: Path) -> None:
    """It runs on the loop: one token of a hostile model would stop every stream."""
    make_model_dir(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    evil = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    file["decoder"] = {"type": "Sequence", "decoders": [evil]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ModelError, match="regular expression"):
        ModelText(tmp_path)
    evil["pattern"] = {"String": '"Regex":'}
    file["decoder"] = evil
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    ModelText(tmp_path)


def test_damaged_files_are_model_errors(tmp_path: Path) -> None:
    make_model_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer_config"):
        ModelText(tmp_path)


def test_rendering_equals_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = (
        "{%- set ns = namespace(seen=false) -%}\n{{- bos_token }}\n{%- for message in messages %}\n"
        "    {%- if message['role'] == 'system' %}{{ '<<SYS>>' + message['content'] | trim + '<</SYS>>' }}\n"
        "    {%- elif not ns.seen %}{%- set ns.seen = true %}[INST] {{ message | tojson }} [/INST]\n"
        "    {%- else %}{{ loop.index0 }}:{{ message.content }}{{ eos_token }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    make_model_dir(tmp_path, template=source)
    messages = [{"role": "system", "content": " be <kind> "}, *HI, {"role": "assistant", "content": 'é "x"'}]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="<|end|>", chat_template=source
    )
    wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, {"bos_token": "<s>", "eos_token": "<|end|>"}).render(messages) == wanted


def test_what_follows_a_stop_string_does_not_count() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("one two three", add_special_tokens=False).ids
    for step in (1, 5, len(ids)):
        plain = ThinkingReader(ReasoningSplitter(None, False))
        answer, text = GrowingAnswer(Detokenizer(tokenizer, frozenset()), StopScanner(["two"]), plain), ""
        for start in range(0, len(ids), step):
            parts = answer.feed(ids[start : start + step], None)
            text += "".join(part.text for part in parts if isinstance(part, Words))
        assert (text, answer.finish, answer.ids) == ("one ", "stop", ids[:7])


def test_ids_without_end_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0, "b": MAX_IDS}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="id"):
        ModelText(tmp_path).table()
    gaps = as_told(Tokenizer(models.WordLevel(vocab={"a": 0, "b": 40_000}, unk_token="a")))
    assert [gaps.id_to_token(one) for one in (-1, 0, 1, 40_000, 40_001)] == [None, "a", None, "b", None]
    assert (gaps.vocabulary, gaps.decode([40_000, 7, 0])) == (2, "b a")
