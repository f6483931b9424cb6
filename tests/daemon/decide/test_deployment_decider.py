"""What happens when: each script tells a piece of a deployment's life, event by event, with what is done about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.daemon.decide.decision_scripts import play

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    told = path.read_text()
    played = play(told)
    if os.environ.get("PEERLLM_REWRITE") == "1":
        path.write_text(played)
    assert played == told
