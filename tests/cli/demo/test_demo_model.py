"""Which model the demo shows, where it comes from, and what is said where it cannot be had."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo import demo_model as module
from peerllm.cli.demo.demo_model import FIRST, demo_model
from peerllm.daemon.deployment.model_files import ModelOnDisk
from peerllm.errors import NotFoundError, UnavailableError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that has everything, and needs a download for it; what was downloaded."""
    downloads: list[str] = []

    @asynccontextmanager
    async def looked_up(model, cache, tell):
        yield ModelOnDisk(tmp_path / "outline", 3000)

    async def resolve(model, cache, progress, total_bytes):
        for share in (0.2, 0.9):
            progress(share)
        assert total_bytes == 3000
        downloads.append(model)
        return tmp_path / "whole"

    monkeypatch.setattr(module, "looked_up", looked_up)
    monkeypatch.setattr(module, "resolve", resolve)
    return downloads


def test_all_of_a_real_model_is_here_before_devices_start(
    hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = demo_model(None, tmp_path, quiet=False)
    assert (found.name, found.directory, found.instead) == (FIRST, tmp_path / "whole", "")
    assert found.question == "What is the capital of France?" and hub == [FIRST]
    said = capsys.readouterr().err.splitlines()
    assert said == ["Looking for smollm2.", "downloading smollm2 from the Hugging Face hub, 3.00 kB: 0%"]
    assert demo_model("owner/name:Q8_0", tmp_path, quiet=True).name == "owner/name:Q8_0"
    assert capsys.readouterr().err == ""


def test_a_model_on_this_disk_is_not_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = demo_model("builtin", tmp_path, quiet=False)
    assert capsys.readouterr().err == ""
    assert (found.name, found.directory, found.question) == ("builtin", MODEL_DIR, "What are you?")
    assert demo_model(str(MODEL_DIR), tmp_path, quiet=True).name == str(MODEL_DIR)


def test_where_it_cannot_be_had_the_built_in_model_is_shown_and_the_reason_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def looked_up(model, cache, tell):
        raise UnavailableError("no network")
        yield

    monkeypatch.setattr(module, "looked_up", looked_up)
    found = demo_model(None, tmp_path, quiet=True)
    assert (found.name, found.directory) == ("builtin", MODEL_DIR)
    assert found.instead == "smollm2 cannot be had: no network"
    with pytest.raises(UnavailableError, match="no network"):
        demo_model("smollm2", tmp_path, quiet=True)


def test_what_was_asked_for_and_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such directory or file"):
        demo_model("/no/such/file.gguf", tmp_path, quiet=True)
