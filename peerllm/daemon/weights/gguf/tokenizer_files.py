"""tokenizer.json and tokenizer_config.json, as Hugging Face's libraries read them, from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from peerllm.daemon.weights.gguf.merges import listed_merges, scored_merges
from peerllm.daemon.weights.gguf.text_splits import TextSplit, text_split
from peerllm.daemon.weights.gguf.token_table import CONTROL, UNKNOWN, USER_DEFINED, TokenTable, flag, token_table
from peerllm.errors import ModelError

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json that is read
SPACE = "▁"  # stands for a space in SentencePiece's pieces

Json = dict[str, Any]
_KEEPS_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})  # Phi-3's other special tokens swallow spaces after them


def tokenizer_files(metadata: Mapping[str, Any]) -> Mapping[str, bytes]:
    """The two files' contents by their names; ModelError for what is missing, inconsistent or unknown."""
    table = token_table(metadata)
    ids = {text: number for number, text in enumerate(table.tokens)}
    if table.model == "gpt2":
        split = text_split(metadata.get("tokenizer.ggml.pre"))
        steps = _byte_level(split, listed_merges(metadata, ids))
        bos = split.starts_with_bos
    else:
        merges = scored_merges(metadata, table.tokens) if table.model == "llama" else listed_merges(metadata, ids)
        prefix = flag(metadata, "add_space_prefix", table.model == "llama")
        steps = _sentence_piece(table, merges, prefix)
        bos = True
    steps["model"]["vocab"] = ids
    steps["added_tokens"] = _added_tokens(table, metadata.get("general.architecture") == "phi3")
    steps["post_processor"] = _post_processor(metadata, table, bos)
    try:
        files = {"tokenizer.json": orjson.dumps(steps), "tokenizer_config.json": orjson.dumps(_config(metadata, table))}
    except TypeError as error:
        raise ModelError(f"the GGUF file's tokenizer has text that is not UTF-8: {error}") from error
    if any(len(content) > MAX_JSON_BYTES for content in files.values()):
        raise ModelError(f"the GGUF file's tokenizer takes more than {MAX_JSON_BYTES} bytes")
    return files


def stop_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer, the end of the text first; none where the file names none."""
    return token_table(metadata).stop_ids()


def _byte_level(split: TextSplit, merges: list[tuple[str, str]]) -> Json:
    """Bytes are written as letters, and merged within words."""
    cuts = [_node("Split", pattern={"Regex": one}, behavior="Isolated", invert=False) for one in split.patterns]
    letters = _node("ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return {
        "normalizer": _node("NFC") if split.composed else None,
        "pre_tokenizer": _node("Sequence", pretokenizers=[*cuts, letters]),
        "decoder": letters,
        "model": _bpe(merges, ignore_merges=split.whole_words),
    }


def _sentence_piece(table: TokenTable, merges: list[tuple[str, str]], prefix: bool) -> Json:
    """Spaces are written as ▁, whole texts are merged, and characters without a token become byte tokens."""
    spaces = _node("Replace", pattern={"String": " "}, content=SPACE)
    before = [_node("Prepend", prepend=SPACE)] if prefix else []
    after = [_node("Strip", content=" ", start=1, stop=0)] if prefix else []
    back = _node("Replace", pattern={"String": SPACE}, content=" ")
    unknown = table.tokens[table.ids["unknown"]] if "unknown" in table.ids else None
    return {
        "normalizer": _node("Sequence", normalizers=[*before, spaces]),
        "pre_tokenizer": None,
        "decoder": _node("Sequence", decoders=[back, _node("ByteFallback"), _node("Fuse"), *after]),
        "model": _bpe(merges, byte_fallback=True, fuse_unk=True, unk_token=unknown),
    }


def _node(kind: str, **options: Any) -> Json:
    return {"type": kind, **options}


def _bpe(merges: list[tuple[str, str]], **options: Any) -> Json:
    defaults = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "unk_token": None, "dropout": None}
    return _node("BPE", **{**defaults, **options}, merges=merges)


def _added_tokens(table: TokenTable, phi3: bool) -> list[Json]:
    """The tokens that are found in text before it is cut; special ones stand for no text."""
    turn_ends = set(table.turn_ends())
    found = {*np.flatnonzero(np.isin(table.kinds, (UNKNOWN, CONTROL, USER_DEFINED))).tolist(), *turn_ends}
    return [
        {
            "id": number,
            "content": table.tokens[number],
            "special": bool(table.kinds[number] != USER_DEFINED) or number in turn_ends,
            "normalized": False,  # files have them as they stand in text
            "single_word": False,
            "lstrip": False,
            "rstrip": phi3 and table.model == "llama" and table.tokens[number] not in _KEEPS_SPACES,
        }
        for number in sorted(found)
    ]


def _post_processor(metadata: Mapping[str, Any], table: TokenTable, bos: bool) -> Json | None:
    """What is put before and after a text that no chat template made."""
    special: dict[str, Json] = {}
    around: list[list[Json]] = []
    for name, usual in (("bos", bos and "bos" in table.ids), ("eos", False)):
        around.append([])
        if not flag(metadata, f"add_{name}_token", usual):
            continue
        if name not in table.ids:
            raise ModelError(f"the GGUF file adds a token {name} to texts, but does not say which that is")
        number = table.ids[name]
        text = table.tokens[number]
        special[text] = {"id": text, "ids": [number], "tokens": [text]}
        around[-1].append({"SpecialToken": {"id": text, "type_id": 0}})
    if not special:
        return None
    before, after = around
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    processor = _node("TemplateProcessing", single=[*before, one, *after], pair=[*before, one, two, *after])
    return processor | {"special_tokens": special}


def _config(metadata: Mapping[str, Any], table: TokenTable) -> Json:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {theirs: table.tokens[table.ids[ours]] for ours, theirs in names.items() if ours in table.ids}
    template = metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if isinstance(template, str) else {})
