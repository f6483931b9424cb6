"""What the files beside a model's weights show of what it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.chat_templates import abilities_in
from peerllm.stored_types import POOLING_FILE

PLAIN = "{{ messages }}"
NAMED = [{"name": "tool_use", "template": PLAIN}, {"name": "default", "template": PLAIN + "</think>"}, 3]


@pytest.mark.parametrize(
    ("files", "can"),
    [
        ({}, ()),
        ({"tokenizer_config.json": {"chat_template": PLAIN}}, ("tools",)),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, ("tools", "thinking")),
        ({"tokenizer_config.json": {"chat_template": NAMED[:1]}}, ("tools",)),
        ({"tokenizer_config.json": {"chat_template": [{"name": [], "template": PLAIN}, *NAMED[:1]]}}, ("tools",)),
        ({"tokenizer_config.json": {"chat_template": 3}}, ()),
        ({"tokenizer_config.json": [3]}, ()),
        ({"chat_template.json": {"chat_template": PLAIN + "[THINK][/THINK]"}}, ("tools", "thinking")),
        ({"chat_template.jinja": "<|channel|>final<|message|>"}, ("tools", "thinking")),
        ({"chat_template.jinja": PLAIN, "tokenizer_config.json": {"chat_template": "</think>"}}, ("tools",)),
        ({POOLING_FILE: {}}, ("embedding",)),
    ],
)
def test_files_show_what_a_model_can_do(tmp_path: Path, files: dict[str, Any], can: tuple[str, ...]) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert abilities_in(tmp_path) == can


def test_what_cannot_be_read_shows_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert abilities_in(tmp_path) == ()
    assert abilities_in(MODEL_DIR) == ("tools",)
