"""The pages name what is there: files and folders of the code, and every message of the wire."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from peerllm.daemon.control_messages import Control, Question
from peerllm.daemon.network.limits.message_sizes import MAX_BYTES
from peerllm.transport.frames.frame import FrameKind

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "THREAT_MODEL.md"]
PLACE = re.compile(r"`([\w./-]+(?:\.py|/))(?:::?\w+)?`")


def places() -> set[str]:
    """Every file and folder of the repository, and each end of its path."""
    found = set()
    for top in ("peerllm", "tests", "benchmarks", "docs", "systemd"):
        for path in [ROOT / top, *(ROOT / top).rglob("*")]:
            parts = path.relative_to(ROOT).parts
            found |= {"/".join(parts[start:]) for start in range(len(parts))}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_folder_that_a_page_names_is_there(page: Path) -> None:
    named = {name.removeprefix("../").rstrip("/") for name in PLACE.findall(page.read_text())}
    assert not named - places()


def test_the_wire_page_names_every_message_and_every_kind_of_frame() -> None:
    page = (ROOT / "docs" / "wire.md").read_text()
    messages = {one.__name__ for one in (*get_args(Control), *get_args(Question))}
    assert not {name for name in messages if f"`{name}`" not in page}
    assert not {kind.name for kind in FrameKind if kind.name not in page}
    bounded = page[page.index("**Bounds.**") : page.index("**Questions.**")]
    assert not {name for name in MAX_BYTES if f"`{name}`" not in bounded}
