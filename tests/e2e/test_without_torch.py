"""Real devices on a machine that has neither torch nor transformers: the built-in model, divided, says the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peerllm.builtin import MODEL_DIR
from tests.e2e import tiny
from tests.household import household

QUESTION = "What are you?"
TOKENS = 12
CONTEXT = 256
WITHOUT = """
from importlib.machinery import PathFinder

whole = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {"torch", "transformers"} else whole(name, path, target)


PathFinder.find_spec = find_spec
"""


@pytest.fixture
def without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process started from here on imports as if the two were not installed."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))


@pytest.mark.usefixtures("without_torch")
def test_two_devices_run_the_built_in_model(tmp_path: Path) -> None:
    with household(tmp_path, ["laptop", "mini-pc"]) as (laptop, _):
        laptop.cli("run", "builtin", "--slots", "2", "--context", str(CONTEXT))
        assert laptop.status()["devices"][0]["engine"] == "running"
        assert laptop.cli("chat", QUESTION, "--temperature", "0", "--max-tokens", str(TOKENS)).stdout.strip()
        body = {
            "model": "builtin",
            "temperature": 0,
            "max_tokens": TOKENS,
            "return_token_ids": True,
            "messages": [{"role": "user", "content": QUESTION}],
        }
        said = laptop.post("/v1/chat/completions", body)["choices"][0]["token_ids"]
    assert said == tiny.answer(MODEL_DIR, QUESTION, TOKENS)
