"""Chat templates as they lie beside a model's weights, and what they show of what the model can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from peerllm.errors import ModelError
from peerllm.regular_files import UnfitFileError, read_regular
from peerllm.stored_types import POOLING_FILE

MAX_FILE_BYTES = 16 << 20  # of each file but the tokenizer

Marks = tuple[str, str]  # before and behind what is thought
MARKS: tuple[Marks, ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought\n", "<channel|>"))


def marks_of(template: str) -> Marks | None:
    """Those that a chat template knows; None: its model does not think, or not in a way that is known here."""
    return next((marks for marks in MARKS if marks[1] in template), None)


def has_channels(template: str) -> bool:
    """Whether its model answers in gpt-oss's harmony form, and thinks in a channel of its own."""
    return "<|channel|>" in template and "<|message|>" in template


def abilities(template: str | None, pooled: bool = False) -> tuple[str, ...]:
    """As Ollama's clients call them; None: there is no template. `pooled`: it was trained for vectors of texts."""
    thinks = template is not None and (has_channels(template) or marks_of(template) is not None)
    every = (("tools", template is not None), ("thinking", thinks), ("embedding", pooled))
    return tuple(name for name, can in every if can)


def abilities_in(model_dir: Path) -> tuple[str, ...]:
    """Of the model in a directory; none are known where its files cannot be read."""
    try:
        default, with_tools = template_sources(model_dir)
    except ModelError:
        return ()
    return abilities(default or with_tools, (model_dir / POOLING_FILE).is_file())


def template_sources(model_dir: Path) -> tuple[str | None, str | None]:
    """chat_template.jinja, chat_template.json or tokenizer_config.json; of several the one named "default".

    And the one that is for chats with tools, if it is another. ModelError where a file cannot be read.
    """
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return model_file(path).decode("utf-8", "replace"), None
    found = model_object(model_dir / "chat_template.json").get("chat_template")
    found = found or model_object(model_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = [(one.get("name"), one.get("template")) for one in found if isinstance(one, dict)]
        both = tuple(next((made for name, made in named if name == wanted), None) for wanted in ("default", "tool_use"))
    else:
        both = found, None
    default, with_tools = (one if isinstance(one, str) else None for one in both)
    return default, with_tools


def model_file(path: Path, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """A model's file; ModelError says why it cannot be had."""
    try:
        return read_regular(path, most_bytes)
    except UnfitFileError as error:
        raise ModelError(f"{path.name} {error.strerror}") from error
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}") from error


def model_object(path: Path) -> Mapping[str, Any]:
    """The object in a file, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = orjson.loads(model_file(path))
    except ValueError as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}
