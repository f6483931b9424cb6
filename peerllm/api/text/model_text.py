"""All of a model directory that has to do with text: tokenizer, chat template, special tokens, sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from peerllm.api.text.detokenizer import Detokenizer, special_ids
from peerllm.api.text.template import ChatTemplate, Message
from peerllm.errors import ModelError
from peerllm.types import SAMPLING_LIMITS

MAX_FILE_BYTES = 256 << 20  # of tokenizer.json and its neighbours
FALLBACK_SAMPLING = {"temperature": 0.7, "top_p": 0.95}  # where neither the client nor the model says anything
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ModelText:
    """Built from files, so in a worker thread; afterwards safe to use from several threads."""

    def __init__(self, model_dir: Path) -> None:
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"the model in {model_dir.name!r} has no tokenizer.json, so it cannot read text")
        try:
            self._tokenizer = Tokenizer.from_buffer(_read(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(f"tokenizer.json of {model_dir.name!r} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = special_ids(self._tokenizer)
        config = _json(model_dir / "tokenizer_config.json")
        source = _template_source(model_dir, config)
        self._template = ChatTemplate(source, _special_tokens(config)) if source else None
        self.defaults = _sampling_defaults(_json(model_dir / "generation_config.json"))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the answer begins.

        A base model (no chat template) continues the messages' text, joined by line breaks.
        """
        if self._template is None:
            text = "\n".join(str(message["content"]) for message in messages)
            return list(self._tokenizer.encode(text).ids)
        return list(self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids)

    def detokenizer(self, silent: frozenset[int]) -> Detokenizer:
        """For one answer; ids in `silent` have no text, nor have the special ones."""
        return Detokenizer(self._tokenizer, silent | self._special)


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelError(f"{path.name} is larger than {MAX_FILE_BYTES} bytes")
    return path.read_bytes()


def _json(path: Path) -> Mapping[str, Any]:
    """The object in a file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = orjson.loads(_read(path))
    except ValueError as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _template_source(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, chat_template.json or tokenizer_config.json; of several the one named "default"."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return _read(path).decode("utf-8", "replace")
    found = _json(model_dir / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _sampling_defaults(config: Mapping[str, Any]) -> dict[str, float]:
    """What the model's makers recommend in generation_config.json; FALLBACK_SAMPLING where that is silent or absurd."""
    defaults: dict[str, float] = dict(FALLBACK_SAMPLING)
    for name, low, high in SAMPLING_LIMITS:
        value: Any = config.get(name)
        kinds = (int,) if name == "top_k" else (int, float)
        if name != "seed" and type(value) in kinds and low <= value <= high:
            defaults[name] = value
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
