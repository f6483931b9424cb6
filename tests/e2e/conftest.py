"""The demo's household for every test that only talks to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from peerllm.builtin import MODEL_DIR
from peerllm.cli.demo.demo import NAMES, SLOTS
from peerllm.cli.demo.demo_memory import limits, sizes_of
from tests.household import Device, household

CONTEXT = 1024


@pytest.fixture(scope="package")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    """Three devices, each lending too little for the built-in model, which they serve together."""
    names = NAMES[:3]
    sizes = limits(sizes_of(MODEL_DIR, SLOTS, CONTEXT), len(names))
    memory = {name: str(size) for name, size in zip(names, sizes, strict=True)}
    with household(tmp_path_factory.mktemp("demo"), names, memory=memory) as started:
        started[0].cli("run", "builtin", "--slots", str(SLOTS), "--context", str(CONTEXT))
        yield started
