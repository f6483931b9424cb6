"""What happens when: each script tells a piece of a deployment's life, event by event, with what is done about it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from peerllm.daemon.decide.deployment_life import rules
from tests.daemon.decide.decision_scripts import play

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.txt"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path: Path) -> None:
    told = path.read_text()
    played = play(told)
    if os.environ.get("PEERLLM_REWRITE") == "1":
        path.write_text(played)
    assert played == told


def test_the_table_lists_the_rules_in_their_order() -> None:
    """The page that people read is the one that is obeyed."""
    told = re.findall(r"^\| `(\w+)` \|", rules.__doc__ or "", re.MULTILINE)
    assert told == [rule.__name__ for rule in rules.DeploymentRules.TABLE]
