"""How large tests are: `make lab` takes everything, any other run a share."""

from __future__ import annotations

import os

FULL = os.environ.get("PEERLLM_FULL") == "1"


def examples(all_of_them: int) -> int:
    """Of a property."""
    return all_of_them if FULL else all_of_them // 3
